# Sourced by a job's script before its setup: . guard.sh PROFILE LINES SIGNALS [may-fail]
# LINES: how many lines of setup the profile has; they follow the script's line hpc_cifar_first=$LINENO. SIGNALS: exit codes of what
# a signal of Slurm ended, which is no failure. may-fail: what fails is named only.
# ERR sees a command that fails outside of conditions, EXIT what ends the script by itself. launch/first_words.py reads these lines.
# shellcheck shell=bash
echo "hpc-cifar: start ${SLURM_RESTART_COUNT:-0} of job ${SLURM_JOB_ID-} on $HOSTNAME" >&2
hpc_cifar_profile=$1 hpc_cifar_lines=$2 hpc_cifar_signals=$3 hpc_cifar_may_fail=${4-} hpc_cifar_over='' hpc_cifar_first=0
hpc_cifar_depth=$((${#BASH_SOURCE[@]} - 1)).$BASH_SUBSHELL

hpc_cifar_failed() { # CODE WHAT
  case " $hpc_cifar_signals " in *" $1 "*) return 0 ;; esac
  if [ -n "$hpc_cifar_may_fail" ]; then
    printf 'hpc-cifar: %s; the job goes on, since setup_may_fail is set\n' "$2" >&2
    return 0
  fi
  printf 'hpc-cifar: %s\n' "$2" >&2
  hpc_cifar_over=1
  exit "$1"
}

hpc_cifar_where() { # LINE: of the script, as a line of the profile
  local number=$(($1 - hpc_cifar_first))
  if [ "$number" -ge 1 ] && [ "$number" -le "$hpc_cifar_lines" ]; then
    printf 'setup line %s of profile %s' "$number" "$hpc_cifar_profile"
  else
    printf 'the environment of profile %s' "$hpc_cifar_profile"
  fi
}

hpc_cifar_command() { # CODE LINE COMMAND DEPTH: what happens in functions, other files and subshells is their own affair
  [ -z "$hpc_cifar_over" ] && [ "$4" = "$hpc_cifar_depth" ] || return 0
  local text
  text=$(sed -n "$2s/^ *//p" "$0" 2>/dev/null) || text='' # as the profile has it
  text=${text:-$3}
  hpc_cifar_failed "$1" "$(hpc_cifar_where "$2") failed with exit code $1: \`${text:0:200}\`"
}

hpc_cifar_exit() { # CODE COMMAND
  [ -z "$hpc_cifar_over" ] || return 0
  case $1:$2 in 0:exit* | 0:source* | 0:.\ *) ;; 0:*) return 0 ;; esac # else a signal ends the script
  local line where="the setup of profile $hpc_cifar_profile" text=": \`${2:0:200}\`"
  line=$(grep -nF -e "$2" "$0" 2>/dev/null | while IFS=: read -r at _; do
    [ "$at" -le "$hpc_cifar_first" ] || { echo "$at" && break; }
  done)
  [ -z "$line" ] || where=$(hpc_cifar_where "$line")
  case $2 in hpc_cifar_*) text='' ;; esac # what bash cannot parse it has not begun
  printf 'hpc-cifar: %s ended the job with exit code %s%s\n' "$where" "$1" "$text" >&2
}

hpc_cifar_module() { # NAME: some modules fail with code 0; then nothing is loaded that was not before, and this one was not
  local before=${_LMFILES_-} code=0 how='' shown
  module load "$1" || code=$?
  if [ "$code" = 0 ] && [ "${_LMFILES_-}" = "$before" ] && [ -n "${MODULESHOME-}" ]; then
    shown=$(module show "$1" 2>&1)
    hpc_cifar_is_loaded "$shown" || how=' and loaded nothing'
  fi
  [ "$code$how" = 0 ] || hpc_cifar_failed "${code/#0/1}" "module load $1 failed with exit code $code$how"
}

hpc_cifar_is_loaded() { # TEXT: whether it names the file of a module that is loaded
  local file IFS=:
  for file in ${_LMFILES_-}; do
    case $1 in *"$file"*) return 0 ;; esac
  done
  return 1
}

hpc_cifar_unguard() { # the traps stay: those that the setup has set itself are its own
  hpc_cifar_over=1
}

trap 'hpc_cifar_command "$?" "$LINENO" "$BASH_COMMAND" "${#BASH_SOURCE[@]}.$BASH_SUBSHELL"' ERR
trap 'hpc_cifar_exit "$?" "$BASH_COMMAND"' EXIT
