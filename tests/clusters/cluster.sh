#!/usr/bin/env bash
# A real SLURM cluster of one node on this machine, with accounting: `cluster.sh start FOLDER`, `cluster.sh stop FOLDER`.
# Needs root and Debian's slurmctld slurmd slurmdbd slurm-client munge mariadb-server. `nox -s slurm` uses it.
set -euo pipefail
folder=$(realpath -m "${2:?folder}")
export SLURM_CONF=$folder/etc/slurm.conf  # slurmdbd looks for its own file beside it

start() {
    if pgrep -x slurmctld || pgrep -x slurmd || pgrep -x munged; then
        echo "SLURM runs here already: this is for a machine without" && exit 1
    fi
    mkdir -p "$folder"/{etc,log,state,spool,mysql} /run/munge /run/mysqld
    chown munge: /run/munge && chown mysql: /run/mysqld "$folder/mysql" && chmod 755 "$folder"
    [ -s /etc/munge/munge.key ] || runuser -u munge -- mungekey --create
    runuser -u munge -- munged --force
    mariadb-install-db --user=mysql --datadir="$folder/mysql" >"$folder/log/mariadb-install.log" 2>&1
    mariadbd --user=mysql --datadir="$folder/mysql" --skip-networking --socket=/run/mysqld/slurm.sock \
        >"$folder/log/mariadb.log" 2>&1 &
    echo $! >"$folder/mariadb.pid"
    for _ in $(seq 60); do mariadb -S /run/mysqld/slurm.sock -e 'select 1' >/dev/null 2>&1 && break; sleep 0.5; done
    mariadb -S /run/mysqld/slurm.sock -e "create database slurm_acct_db; create user slurm@localhost identified by 'slurm';
        grant all on slurm_acct_db.* to slurm@localhost;"
    cat >"$folder/etc/slurmdbd.conf" <<EOF
AuthType=auth/munge
DbdHost=localhost
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile=$folder/log/slurmdbd.log
PidFile=$folder/slurmdbd.pid
EOF
    chmod 600 "$folder/etc/slurmdbd.conf"
    cat >"$SLURM_CONF" <<EOF
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
JobAcctGatherType=jobacct_gather/linux
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
KillWait=30
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$(($(free -m | awk '/^Mem/ {print $2}') * 8 / 10)) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
    # libmysqlclient finds the socket by its default path
    ln -sf /run/mysqld/slurm.sock /run/mysqld/mysqld.sock
    slurmdbd
    for _ in $(seq 60); do sacctmgr -n show cluster >/dev/null 2>&1 && break; sleep 0.5; done
    sacctmgr -i add cluster one >/dev/null
    slurmctld
    slurmd
    for _ in $(seq 60); do sinfo -h -o %T 2>/dev/null | grep -q idle && return; sleep 0.5; done
    echo "the node does not become idle:" && sinfo && tail "$folder"/log/*.log && exit 1
}

stop() {
    scancel --user root && sleep 2  # of this cluster only
    for name in slurmd slurmctld slurmdbd mariadb; do
        [ -s "$folder/$name.pid" ] && kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
    done
    pkill -F /run/munge/munged.pid munged || true
}

"$1"
