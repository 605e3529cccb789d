# What is left to do where no rank could: a signal ended the tasks before their program could listen, a node was not reached, or
# all ranks were killed. The job begins again, unless a rank has ended this segment or said why it failed, or it was cancelled.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
run=$hpc_cifar_code/..
segment=$job.${SLURM_RESTART_COUNT:-0}
event=
case $early in *"|$code|"*) event="early exit" most=$most_early ;; esac
case $kills in *"|$code|"*) event="killed rank" most=$most_kills ;; esac
if [ -n "$event" ] && [ ! -e "$run/cancelled" ] && ! grep -qs '"done": true' "$run/endings/$segment.json" &&
  ! grep -qs '"state": "finished"' "$run/result.json" &&
  ! grep -sF "\"$segment\"" "$run/failures.jsonl" | grep -qv '"hang": true'; then
  said=$(tail -n 200 "$run/submitit/${job}_0_log.err" 2>/dev/null | sed -n '/^hpc-cifar: start /{h;d;};H;${x;p;}' | grep -o 'srun: error: .*task.*' | head -n 1 |
    cut -c 14-200 | tr -d '"\\' | tr -c '[:print:]' ' ')
  case $said in *"Out Of Memory"*) event="out of memory" most=$most_memory ;; esac
  step=$(readlink "$run/checkpoints/latest" 2>/dev/null | sed -n 's/^step-0*\([0-9]\)/\1/p')
  step=${step:-0}
  before=$(grep -F "\"event\": \"$event\", \"step\": $step," "$run/interruptions.jsonl" 2>/dev/null | wc -l)
  faults=$(grep -F ", \"step\": $step," "$run/interruptions.jsonl" 2>/dev/null | grep -cv '"event": "\(preempted\|time limit\|early exit\)"')
  case $event in "early exit") faults=-1 ;; esac # has a limit of its own
  printf '{"time": "%s", "segment": "%s", "event": "%s", "step": %d, "rank": null, "reason": "%s"}\n' \
    "$(date -u +%FT%T+00:00)" "$segment" "$event" "$step" "srun ended with exit code $code${said:+ ($said)}" \
    >>"$run/interruptions.jsonl"
  if [ "$before" -lt "$most" ] && [ "$faults" -lt "$most_kills" ]; then
    echo "hpc-cifar: $event: srun ended with exit code $code; the job begins again" >&2
    scontrol requeue Incomplete "$job" || { sleep 5 && scontrol requeue Incomplete "$job"; }
  else
    echo "hpc-cifar: $event: srun ended with exit code $code, after $((before > faults ? before : faults)) restarts without a checkpoint in between" >&2
  fi
fi
exit $code
