#!/bin/bash
# Pretrain on Slurm: starts Ray on the nodes of the allocation, runs one command on it, and takes Ray down again.
#
#   sbatch --nodes=2 --gpus-per-node=4 cluster/slurm.sh configs/mmearth64_atto.yaml run.directory=/shared/runs/first
#
# in the repository's root, which all nodes must mount; arguments are those of python -m mmearth_ray.pretrain.  Ten minutes
# before the time limit the run saves a checkpoint and the job is queued again; the same command then resumes.  SIGTERM to this
# script alone (scancel --signal=TERM --batch) saves and ends.  PYTHON names another interpreter than .venv/bin/python.
# Exit code: that of the run.
#SBATCH --job-name=mmearth-ray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mmearth-ray-%j.log

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
python=${PYTHON:-.venv/bin/python}
join_seconds=${JOIN_SECONDS:-300}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}')
read -r port client_port agent_port < <("$python" - <<'PY'
import random, socket
free = []  # below the ports that the system hands out by itself, for Ray binds some of them late
for port in random.sample(range(20_000, 32_000), 100):
    with socket.socket() as one:
        if one.connect_ex(("127.0.0.1", port)):
            free.append(port)
print(*free[:3])
PY
)

# srun hands the environment on; nobody else on the nodes can read it
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ADDRESS=$head_ip:$port RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID
RAY_AUTH_TOKEN=$("$python" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

steps=()
driver=""
requeue=""
interrupted=""

stop_ray() { # Ray's processes end with their srun; the head goes last
    trap - EXIT
    for ((i = ${#steps[@]} - 1; i >= 0; i--)); do
        kill -TERM "${steps[i]}" 2>/dev/null || true
        wait "${steps[i]}" 2>/dev/null || true
    done
}

save_and_stop() { # the run answers SIGTERM with a checkpoint; before it has begun there is nothing to save
    [[ -n $driver ]] || exit 143
    interrupted=yes
    kill -TERM "$driver" 2>/dev/null || true
}

trap stop_ray EXIT
trap 'requeue=yes; save_and_stop' USR1
trap save_and_stop TERM

cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}
start_on() { # HOST ARGUMENTS of ray start: in the background, one task with the whole node
    srun --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --nodelist="$1" \
        "$python" -m ray.scripts.scripts start --block --num-cpus="$cpus" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
        --disable-usage-stats "${@:2}" &
    steps+=($!)
}

joined() { # COUNT: whether so many nodes are alive
    (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null && "$python" - "$1" <<'PY' 2>/dev/null
import logging, sys, ray
ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))
PY
}

wait_for_nodes() { # COUNT
    local deadline=$((SECONDS + join_seconds))
    until joined "$1"; do
        for pid in "${steps[@]}"; do
            kill -0 "$pid" 2>/dev/null || { echo "error: Ray ended on one of ${nodes[*]}; its lines are above" >&2; exit 1; }
        done
        ((SECONDS < deadline)) || { echo "error: not all of ${nodes[*]} joined within $join_seconds s" >&2; exit 1; }
        sleep 1
    done
}

start_on "$head" --head --node-ip-address="$head_ip" --port="$port" --ray-client-server-port="$client_port" \
    --dashboard-agent-listen-port="$agent_port" --include-dashboard=false
wait_for_nodes 1 # the others need a head to join
for node in "${nodes[@]:1}"; do
    start_on "$node" --address="$RAY_ADDRESS"
done
((${#nodes[@]} == 1)) || wait_for_nodes "${#nodes[@]}"
echo "Ray runs on ${#nodes[@]} nodes, head $head"

"$python" -m mmearth_ray.pretrain "$@" &
driver=$!
code=0
wait "$driver" || code=$?
while [[ -n $interrupted ]]; do # the signal ended `wait`, not the run
    interrupted=""
    code=0
    wait "$driver" || code=$?
done

stop_ray
if [[ -n $requeue && $code == 0 ]]; then
    echo "queued again: the same command resumes"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
