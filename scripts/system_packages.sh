#!/usr/bin/env bash
# What the tests need beside Python: installed when root on Debian or Ubuntu, else named with the command to type.
# The tests run either way; a component without its program stands in the final table as not exercised.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

missing=()
need() { # PACKAGE COMMAND...: the package is there if the command succeeds
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}
program() { command -v "$1"; }
any_program() { local name; for name in "$@"; do if command -v "$name"; then return; fi; done; return 1; }
any_file() { local name; for name in "$@"; do if [ -e "$name" ]; then return; fi; done; return 1; }
programs() { local name; for name in "$@"; do command -v "$name" || return 1; done; }

need slurm-wlm programs slurmctld slurmd sbatch srun scontrol
need munge program munged
need slurmdbd programs slurmdbd sacctmgr
need mariadb-server any_program mariadbd mysqld
need mmdebstrap program mmdebstrap
need chromium any_program chromium chromium-browser google-chrome
need g++ program g++
need pkg-config program pkg-config
need libopencv-dev pkg-config --exists opencv4
need libturbojpeg0-dev pkg-config --exists libturbojpeg
# Lmod and environment-modules exclude each other as packages: the second is unpacked, and neither takes the place of the other
need lmod any_file /usr/share/lmod/lmod/init/bash /usr/lib/*/modulecmd.tcl
unpacked=/opt/environment-modules
unpack="cd \$(mktemp -d) && apt-get download -q environment-modules && dpkg -x environment-modules_*.deb $unpacked"
any_file /usr/lib/*/modulecmd.tcl "$unpacked"/usr/lib/*/modulecmd.tcl && unpack=

[ ${#missing[@]} -gt 0 ] || [ -n "$unpack" ] || exit 0
command=${missing[*]:+apt-get install --no-install-recommends -y ${missing[*]}}
command=$command${command:+${unpack:+ && }}$unpack
missing+=(${unpack:+environment-modules})
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "system packages: installing ${missing[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # RUNLEVEL: install the daemons, do not start them
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  if { apt-get update -q && bash -c "$command"; } >"$log" 2>&1; then exit 0; fi
  tail -n 5 "$log" >&2
  echo "system packages: apt-get failed; the tests that need ${missing[*]} cannot run" >&2
else
  echo "system packages: missing ${missing[*]}; the tests that need them cannot run. As root on Debian or Ubuntu:" >&2
  echo "  apt-get update && $command" >&2
fi
