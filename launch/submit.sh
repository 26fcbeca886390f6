#!/usr/bin/env bash
# Submits a job file to a cluster of some kind and shows its log until it ends; Ctrl-C leaves the job running there.
#
#   launch/submit.sh JOB KIND [--dry-run] [OPTION ...]
#
#   JOB     a job file: launch/quickstart.yaml, launch/chat.yaml ...; its first lines say what it does, and how long that takes
#   KIND    onprem | aws | gcp | azure   `ray up cluster/KIND.yaml` has started it; it is reached through SSH
#           kuberay                      `kubectl apply -f cluster/kuberay/raycluster.yaml` has; reached through kubectl
#           slurm                        sbatch, with nodes of its own
#           skypilot                     a managed job, with a machine of its own
#           http://HOST:8265             the dashboard of any other Ray cluster
#   OPTION  of `distft submit`: --set KEY=VALUE, --name NAME, --resume, --runs DIR ...; for slurm and skypilot --set alone
#
# What it costs is what its nodes cost meanwhile, by the hour: cluster/README.md, which also says how to tear them down.
# --dry-run checks the job file, shows what would be called, and calls nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PWD/.venv/bin:$PATH

if [ $# -lt 2 ]; then
  sed -n '2,/^set /{/^#/p}' "launch/${BASH_SOURCE[0]##*/}" >&2
  exit 2
fi
job=$1 kind=$2 dry=
shift 2
options=()
for option in "$@"; do
  if [ "$option" = --dry-run ]; then dry=yes; else options+=("$option"); fi
done
# A port of this machine that leads to the cluster's dashboard.
port=${DISTFT_PORT:-8265}

# Calls a command, or only shows it.
call() {
  echo "+ $*" >&2
  [ -n "$dry" ] || "$@"
}

# Opens a way to the cluster's dashboard, which listens on no network, for as long as this script runs.
tunnel() {
  echo "+ $* &" >&2
  [ -z "$dry" ] || return 0
  "$@" >/dev/null &
  trap 'kill $! 2>/dev/null' EXIT
  for _ in $(seq 60); do
    ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || return 0
    kill -0 $! 2>/dev/null || break
    sleep 1
  done
  echo "submit.sh: no way to the cluster's dashboard; is it up?" >&2
  exit 4
}

submit() {
  call distft submit "$job" --address "$1" --wait "${options[@]}"
}

sed -n '/^#/!q; s/^# \{0,1\}//p' "$job"
distft submit "$job" --dry-run "${options[@]}" >/dev/null # every mistake, before anything is called
case $kind in
aws | gcp | azure | kuberay) options=(--set cluster.wait_seconds=1200 "${options[@]}") ;; # their nodes come when asked for
esac
case $kind in
onprem | aws | gcp | azure)
  tunnel ray dashboard "cluster/$kind.yaml" --port "$port" --remote-port 8265
  submit "http://localhost:$port"
  ;;
kuberay)
  tunnel kubectl --namespace distft port-forward service/distft-head-svc "$port:8265"
  submit "http://localhost:$port"
  ;;
slurm) call sbatch cluster/slurm/distft.sbatch "$job" "${options[@]}" ;;
skypilot)
  [ ${#options[@]} -eq 0 ] || { echo "submit.sh: skypilot takes the job file as it is" >&2 && exit 2; }
  call sky jobs launch cluster/skypilot.yaml --env-file cluster/values.env --env "JOB=$job"
  ;;
http://* | https://*) submit "$kind" ;;
*)
  echo "submit.sh: $kind is no kind of cluster: onprem, aws, gcp, azure, kuberay, slurm, skypilot or http://HOST:8265" >&2
  exit 2
  ;;
esac
