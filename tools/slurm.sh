#!/bin/bash
# One run over the machines of a Slurm job, which saves itself and queues again before its time is up:
#
#   sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 --time 12:00:00 tools/slurm.sh \
#       --config configs/pretrain/in1k_b16.yaml --run-dir /shared/runs/b16
#
# What stands after the script goes to tools/pretrain.py; TOOL=finetune sbatch ... takes another tool. Submit from the
# repository; the run folder must be on a file system that all machines see. docs/cluster.md tells the rest.
#
#SBATCH --job-name=mpp
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Five minutes before the end (B: to this script alone, which passes it on).
#SBATCH --signal=B:USR1@300

set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1

tool=tools/${TOOL:-pretrain}.py
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHON

# One process per GPU; the machines meet at the first one, at a port below those that are handed out to programs.
export PER_NODE=${SLURM_GPUS_ON_NODE:-1}
RDZV_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RDZV_HOST
export RDZV_PORT=$((15000 + SLURM_JOB_ID % 15000))
# A torchrun that lives on from before the requeue must not be met.
export RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}

# A machine that rejoins finds rank 0 where it is now, not where it was (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# srun takes this over from sbatch only so; without it a task may use one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# USR1: the time is nearly up; the ranks finish their step, save and go, and the job is queued again.
# TERM: preempted (Slurm queues it again, --requeue) or cancelled (it must not be); the ranks save and go.
step=""
requeue=""
pass_on() { [ -z "$step" ] || kill "-$1" "$step" 2>/dev/null; }
trap 'requeue=yes; pass_on USR1' USR1
trap 'pass_on TERM' TERM

# One torchrun per machine. It passes USR1 on to its ranks, and gives them 240 s to save; a rank that dies is started
# again with all others, from the last checkpoint, three times. Who is host of the meeting is said, not guessed by name;
# and a network that is away for a while is waited for: by default torchrun gives up after one minute without an answer.
# shellcheck disable=SC2016  # the task's own variables
srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c '
    exec "$PYTHON" -m torch.distributed.run \
        --nnodes="$SLURM_NNODES" --nproc-per-node="$PER_NODE" --max-restarts=3 \
        --rdzv-backend=c10d --rdzv-endpoint="$RDZV_HOST:$RDZV_PORT" --rdzv-id="$RDZV_ID" \
        --rdzv-conf=is_host=$((SLURM_NODEID == 0)),read_timeout=600 \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=240 \
        "$@"' torchrun "$tool" "$@" &
step=$!
[ -z "$requeue" ] || pass_on USR1

# A signal ends the wait, not the step.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

# torchrun ends with 1 after a signal, whatever its ranks ended with. A run that is done says so at its next start.
if [ "$status" -ne 0 ] && [ -n "$requeue" ]; then
    echo "slurm.sh: out of time; job $SLURM_JOB_ID is queued again and goes on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
