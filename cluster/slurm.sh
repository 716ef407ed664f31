#!/usr/bin/env bash
# A sweep on the nodes of one Slurm allocation: a Ray head on the first node, one worker on each other node.
#   sbatch --nodes=4 cluster/slurm.sh sweep search_spaces/quickstart.toml --name first --results /shared/runs
#   sbatch --nodes=4 cluster/slurm.sh resume first --results /shared/runs
# One model over all GPUs of a node: resources.workers = gpus_per_trial = their number, resources.placement = "strict_pack".
# What follows the script's name are arguments of landscape-ray. The results folder must be seen by every node, or
# --storage names a place that is.
#SBATCH --job-name=landscape-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=landscape-ray-%j.out
set -euo pipefail

if [ "$#" -eq 0 ]; then
    echo "usage: sbatch [options] cluster/slurm.sh sweep SPEC.toml --name NAME --results FOLDER" >&2
    exit 2
fi

# a token, because Ray runs whatever anybody asks of its ports; it lies in the home folder, which all nodes share
umask 077
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
ray get-auth-token --generate >/dev/null

port="${RAY_PORT:-$((20000 + SLURM_JOB_ID % 20000))}" # one for each job: several may share a network
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
head_ip="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')"
cpus="${SLURM_CPUS_ON_NODE:-1}"
gpus="${SLURM_GPUS_ON_NODE:-0}"

children=()
driver=""
# shellcheck disable=SC2329  # called by the trap
finish() {
    trap - EXIT
    [ "${#children[@]}" -eq 0 ] || kill "${children[@]}" 2>/dev/null || true
    wait
}
trap finish EXIT
# two minutes before the allocation ends: the driver stops cleanly, and `resume` goes on in another one
trap '[ -z "$driver" ] || kill -TERM "$driver"' TERM INT

# a node that is lost must not take the step of the others along
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" --kill-on-bad-exit=0 \
    ray start --head --block --node-ip-address="$head_ip" --port="$port" --dashboard-host=127.0.0.1 \
    --num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats &
children+=("$!")

for _ in $(seq 60); do
    if (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null; then break; fi
    sleep 1
done

for node in "${nodes[@]:1}"; do
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --kill-on-bad-exit=0 \
        ray start --address="$head_ip:$port" --block --num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats &
    children+=("$!")
done

landscape-ray "$@" --address "$head_ip:$port" &
driver="$!"
status=0
wait "$driver" || status="$?"
if kill -0 "$driver" 2>/dev/null; then # the wait was cut short by the signal; now wait for the clean stop
    status=0
    wait "$driver" || status="$?"
fi
exit "$status"
