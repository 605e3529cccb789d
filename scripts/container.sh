#!/usr/bin/env bash
# The container image of this checkout, by podman:
#   container.sh base    a Debian base where none can be pulled, by mmdebstrap (root): localhost/debian:bookworm-slim
#   container.sh build   $IMAGE from $BASE_IMAGE
#   container.sh check   use $IMAGE as a cluster would
#   container.sh test    build it twice, compare the two, then check it (ONCE=1: one build)
#   container.sh apptainer   the image as a SIF file, used by the same checks, then by a job that `submit` has written
# BUILD_OPTIONS: more options of `podman build`, such as --build-arg UV_DEFAULT_INDEX=...; CA_FILE: certificates to trust in it.
set -euo pipefail
cd "$(dirname "$0")/.."

image=${IMAGE:-localhost/hpc-cifar:latest}
out=build/container
largest=8000000000 # bytes
say() { echo "container: $*"; }
fail() { say "$*" >&2; exit 1; }
read -ra options <<<"${BUILD_OPTIONS:-}"
if [ -n "${CA_FILE:-}" ]; then
  options+=(--volume "$CA_FILE:/run/ca.pem:ro" --build-arg PIP_CERT=/run/ca.pem --build-arg SSL_CERT_FILE=/run/ca.pem)
fi
if [ -n "${BASE_IMAGE:-}" ]; then options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE"); fi
command -v podman >/dev/null || fail "podman is needed (Debian, Ubuntu: apt-get install podman crun buildah)"

base() {
  command -v mmdebstrap >/dev/null || fail "mmdebstrap is needed (apt-get install mmdebstrap)"
  mkdir -p "$out"
  mmdebstrap --variant=apt --include=ca-certificates bookworm "$out/base.tar" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
  podman import --quiet "$out/base.tar" localhost/debian:bookworm-slim
  rm "$out/base.tar"
}

build() { # the same commit, base and packages give the same image: all times in it are the commit's
  local began=$SECONDS commit epoch
  commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
  epoch=$(git log -1 --format=%ct 2>/dev/null || echo 1577836800)
  podman build --quiet --isolation chroot --network host --layers=false --force-rm --timestamp "$epoch" \
    --build-arg "SOURCE_DATE_EPOCH=$epoch" --build-arg "REVISION=$commit" \
    --build-arg "VERSION=$(sed -n '/^version = /{s/.*"\(.*\)"/\1/p;q}' pyproject.toml)" \
    "${options[@]}" --tag "$image" --file Containerfile . >/dev/null
  say "$image $(inspect '{{.Id}}' | cut -c1-12), $(inspect '{{.Size}}') bytes, built in $((SECONDS - began)) s"
}

inspect() { podman image inspect --format "$1" "$image"; }

run() { # podman run; where the kernel gives podman no cgroups of its own (inside another container), without them
  if podman run --rm --network none "$image" true 2>/dev/null; then
    podman run --rm "$@"
    return
  fi
  printf '%s\n' '[containers]' 'cgroups="disabled"' 'default_ulimits=["nofile=20000:20000", "nproc=20000:20000"]' \
    >"$out/containers.conf"
  CONTAINERS_CONF=$out/containers.conf unshare --mount bash -c \
    'mount -t cgroup2 none /sys/fs/cgroup && exec podman run --rm "$@"' bash "$@"
}

listing() { # folders; files with mode, owner, size, time and target; digests. Without what podman itself puts there as it runs
  run --network none --read-only --read-only-tmpfs=false --hostname image "$image" bash -euo pipefail -c '
    cd / && skip=(-path ./proc -o -path ./sys -o -path ./dev -o -path ./run -o -path ./etc/hosts -o -path ./etc/hostname
      -o -path ./etc/resolv.conf -o -path ./etc/mtab)
    find . -mindepth 1 \( "${skip[@]}" \) -prune -o -type d -printf "d %m %U:%G - - %p\n" \
      -o -printf "%y %m %U:%G %s %T@ %p %l\n" | LC_ALL=C sort -T /dev/shm -k6
    find . \( "${skip[@]}" \) -prune -o -type f -print0 | LC_ALL=C sort -T /dev/shm -z | xargs -0 sha256sum'
}

rules() {
  [ "$(inspect '{{.Config.Entrypoint}}{{.Config.User}}{{.Config.Volumes}}')" = '[]map[]' ] ||
    fail "it has an entrypoint, a user or volumes: $(inspect '{{json .Config}}')"
  [ "$(inspect '{{len .Config.Env}}')" = 1 ] || fail "its environment is more than PATH: $(inspect '{{.Config.Env}}')"
  if grep -E '^[^d].* \./(root|home)/' "$1"; then fail "these lie in somebody's home"; fi
  if grep -E '^. .* \./(var/log|var/lib/apt/lists|tmp)/[^ ]' "$1" | grep -v '^d'; then fail "these were left by the build"; fi
  local size
  size=$(inspect '{{.Size}}')
  [ "$size" -lt "$largest" ] || fail "it has $size bytes, $largest are allowed"
}

check() { # read-only, no network, a user of whom nothing is known, no HOME
  run --network none --read-only --user 47110:47110 --passwd=false --tmpfs /tmp:rw,exec,mode=1777 --unsetenv HOME \
    --volume "$PWD/scripts/container/check.sh:/check.sh:ro" "$image" bash /check.sh stranger
}

apptainer_test() {
  local sif=$PWD/$out/hpc-cifar.sif work=$PWD/$out/apptainer tar=$PWD/$out/image.tar
  read -ra program <<<"${APPTAINER:-apptainer}"
  "${program[@]}" --version
  rm -rf "$work" "$sif" "$tar" && mkdir -p "$work/bin" && chmod 1777 "$work"
  podman save --quiet --output "$tar" "$image"
  "${program[@]}" build "$sif" "docker-archive:$tar"
  rm "$tar"
  say "$sif has $(stat -c %s "$sif") bytes"
  "${program[@]}" exec --bind "$PWD/scripts/container" "$sif" bash "$PWD/scripts/container/check.sh" guest

  # what `submit` writes for Slurm, run with stand-ins for sbatch and srun
  printf '#!/bin/sh\nexec %s "$@"\n' "${program[*]}" >"$work/bin/apptainer" && chmod +x "$work/bin/apptainer"
  printf 'container: {runtime: apptainer, image: %s}\ngpu_request: none\n' "$sif" >"$work/here.yaml"
  export HPC_CIFAR_DATA=$work/data HPC_CIFAR_RUNS=$work/runs BATCH_SCRIPT=$work/script.sh
  export PATH=$PWD/scripts/container/slurm:$work/bin:$PATH
  .venv/bin/hpc-cifar prepare digits --no-beton
  .venv/bin/hpc-cifar submit quickstart-digits --cluster "$work/here.yaml" --set epochs=2
  SLURM_JOB_ID=1 SLURM_NTASKS=2 SLURM_NNODES=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=$(uname -n) \
    bash "$work/script.sh"
  grep '"state": "finished"' "$work"/runs/*/result.json || fail "the job has not finished: see $work/runs"
  say "a job that submit wrote for Slurm has trained in Apptainer"
}

case ${1:-} in
  base) base ;;
  build) build ;;
  apptainer) apptainer_test ;;
  check)
    mkdir -p "$out"
    listing >"$out/files-1.txt"
    rules "$out/files-1.txt"
    check
    ;;
  test)
    mkdir -p "$out"
    build
    listing >"$out/files-1.txt"
    if [ -z "${ONCE:-}" ]; then
      first=$(inspect '{{.Id}}')
      podman rmi --force "$image" >/dev/null # room for the next
      build
      listing >"$out/files-2.txt"
      diff "$out/files-1.txt" "$out/files-2.txt" | head -n 20 || true
      cmp -s "$out/files-1.txt" "$out/files-2.txt" || fail "two builds differ in the files above"
      [ "$(inspect '{{.Id}}')" = "$first" ] || fail "two builds have the same files, and other ids"
      say "two builds: one id, the same $(grep -c '^f ' "$out/files-1.txt") files with the same contents, modes and times"
    fi
    rules "$out/files-1.txt"
    check
    say "all checks passed"
    ;;
  *) fail "base, build, check, test or apptainer?" ;;
esac
