#!/usr/bin/env bash
# Run a Slurm cluster of two nodes on this machine, for tests of the launcher (bash script/test.sh --slurm):
#     eval "$(bash tests/proofs/slurm_sandbox.sh start)"; sinfo; bash tests/proofs/slurm_sandbox.sh stop
# All files are below $SLURM_SANDBOX (default: slurm_sandbox in the folder of temporary files). The daemons listen on
# loopback only, and the nodes claim more CPUs and memory than the machine has. `stop` cancels the jobs, then ends the
# daemons by their pid files.
set -euo pipefail
SANDBOX=${SLURM_SANDBOX:-$(dirname "$(mktemp -u)")/slurm_sandbox}
export SLURM_CONF=$SANDBOX/slurm.conf
NODES=(127.0.0.1 127.0.0.2)  # names that resolve everywhere, because tasks look up the first node's
DAEMONS=(slurmd.127.0.0.1 slurmd.127.0.0.2 slurmctld munged)  # in the order in which they are ended

fail() {
    echo "slurm_sandbox.sh: error: $*" >&2
    exit 1
}

alive() {  # whether this daemon runs; its process number may have been given to another program since
    local pid
    pid=$(cat "$SANDBOX/$1.pid" 2>/dev/null) && [[ $(ps -o stat=,comm= -p "$pid") == [^Z]*" ${1%%.*}" ]]
}

install_packages() {
    local missing=()
    for tool in slurmctld slurmd srun munged ps; do command -v $tool >/dev/null || missing+=("$tool"); done
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null && ((EUID == 0)) ||
        fail "${missing[*]} not found: install slurmctld, slurmd, slurm-client, munge and procps, as root with apt-get."
    (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        slurmctld slurmd slurm-client munge procps) >"$SANDBOX/apt.log" 2>&1 ||
        fail "apt-get could not install Slurm: see $SANDBOX/apt.log."
}

configure() {
    local host address node port=17000
    host=$(hostname -s)
    address=$(getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }') || true  # the daemons listen on this address only
    [[ $address == 127.* ]] ||
        fail "This machine's name $host resolves to ${address:-nothing}, not to loopback: map it to 127.0.0.1 in the hosts file."
    mkdir -p "$SANDBOX/state"
    [[ -f $SANDBOX/munge.key ]] || mungekey --create --keyfile="$SANDBOX/munge.key"
    echo "CgroupAutomount=no" >"$SANDBOX/cgroup.conf"
    # In seconds: cred_expire delays the restart of a requeued job, KillWait is the time from SIGTERM to SIGKILL, and
    # MinJobAge how long a finished job is remembered. JobRequeue=0 as on clusters where a job must ask for requeueing.
    cat >"$SLURM_CONF" <<END
ClusterName=sandbox
SlurmctldHost=$host($address)
SlurmctldPort=17000
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$SANDBOX/munge.socket,cred_expire=5
StateSaveLocation=$SANDBOX/state
SlurmctldPidFile=$SANDBOX/slurmctld.pid
SlurmctldLogFile=$SANDBOX/slurmctld.log
SlurmdSpoolDir=$SANDBOX/spool.%n
SlurmdPidFile=$SANDBOX/slurmd.%n.pid
SlurmdLogFile=$SANDBOX/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
JobRequeue=0
KillWait=5
MinJobAge=86400
PartitionName=sandbox Nodes=$(IFS=, && echo "${NODES[*]}") Default=YES State=UP
END
    for node in "${NODES[@]}"; do
        echo "NodeName=$node NodeHostname=$host NodeAddr=$address Port=$((port += 1)) CPUs=20 RealMemory=200000" >>"$SLURM_CONF"
    done
}

launch() {  # launch NAME COMMAND...: start a daemon unless it runs
    alive "$1" || "${@:2}" >>"$SANDBOX/start.log" 2>&1 || fail "$1 did not start: see $SANDBOX/start.log."
}

start() {
    mkdir -p "$SANDBOX" 2>/dev/null && chmod 755 "$SANDBOX" || fail "Cannot write to the folder $SANDBOX."
    install_packages
    alive slurmctld || configure
    launch munged munged --key-file="$SANDBOX/munge.key" --socket="$SANDBOX/munge.socket" \
        --pid-file="$SANDBOX/munged.pid" --log-file="$SANDBOX/munged.log" --seed-file="$SANDBOX/munged.seed"
    launch slurmctld slurmctld -c
    for node in "${NODES[@]}"; do launch "slurmd.$node" slurmd -N "$node"; done
    for _ in {1..60}; do
        if [[ $(sinfo -h -N -o %T 2>/dev/null | grep -c -x -e idle) == "${#NODES[@]}" ]]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 1
    done
    fail "The two nodes did not become idle within a minute: see the logs in $SANDBOX."
}

stop() {
    if alive slurmctld; then
        scancel --user="$(id -un)" 2>/dev/null || true  # or the tasks would outlive the daemons
        for _ in {1..60}; do [[ -n $(squeue -h 2>/dev/null) ]] && sleep 1 || break; done
    fi
    for name in "${DAEMONS[@]}"; do
        alive "$name" && kill "$(cat "$SANDBOX/$name.pid")"
        for _ in {1..20}; do alive "$name" && sleep 0.5 || break; done
        alive "$name" && fail "$name (process $(cat "$SANDBOX/$name.pid")) does not end."
        rm -f "$SANDBOX/$name.pid"
    done
}

case ${1:-} in
start) start ;;
stop) stop ;;
*) fail "The argument must be start or stop." ;;
esac
