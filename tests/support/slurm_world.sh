#!/usr/bin/env bash
# A real SLURM of several virtual nodes, n0 n1 ..., on this machine; run by slurm_world.py as process 1 of
# namespaces of its own (mount, net, pid, uts, ipc). What it mounts, listens at and starts is seen by nobody
# outside, whether or not the machine has a SLURM of its own, and ends with this process.
#   slurm_world.sh DIR NODES
set -euo pipefail
dir="$1" nodes="$2"
mkdir -p "$dir"/{state,spool,log,pid,munge}

# Every node has an address that is not loopback, though all are on the loopback interface.
hostname eep-slurm
ip link set lo up
{ cat /etc/hosts; echo "10.213.0.9 eep-slurm"; } > "$dir/hosts"
ip addr add 10.213.0.9/32 dev lo
for ((i = 0; i < nodes; i++)); do
  ip addr add "10.213.0.$((10 + i))/32" dev lo
  echo "10.213.0.$((10 + i)) n$i" >> "$dir/hosts"
done
mount --bind "$dir/hosts" /etc/hosts
mount -t tmpfs none /dev/shm

{
  cat << CONF
ClusterName=eep
SlurmctldHost=eep-slurm(10.213.0.9)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/pid/slurmctld
SlurmdPidFile=$dir/pid/slurmd.%n
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
KillWait=15
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=1000
CONF
  for ((i = 0; i < nodes; i++)); do
    echo "NodeName=n$i NodeHostname=n$i NodeAddr=10.213.0.$((10 + i)) Port=$((17000 + i)) State=UNKNOWN"
  done
  echo "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
} > "$dir/slurm.conf"

head -c 128 /dev/urandom > "$dir/munge/key"
chmod 400 "$dir/munge/key"
munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" \
  --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
export SLURM_CONF="$dir/slurm.conf"
slurmctld
for ((i = 0; i < nodes; i++)); do
  mkdir -p "$dir/spool/n$i"
  slurmd -N "n$i"
done
for ((i = 0; i < 200; i++)); do
  if [ "$(sinfo -h -N -t idle -o %N 2> /dev/null | wc -l)" = "$nodes" ]; then
    touch "$dir/ready"
    break
  fi
  sleep 0.1
done
# Reaps what the daemons leave behind, until it is killed and everything with it.
while :; do wait; sleep 1; done
