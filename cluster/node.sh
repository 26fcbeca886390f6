#!/usr/bin/env bash
# What `ray up` runs on each node, of whatever provider:
#
#   node.sh setup [PACKAGE ...]   mounts the shared folder and installs distft, as constraints.txt says
#   node.sh head | worker         starts Ray
#   node.sh stop                  ends Ray; fails where a process is left
#
# Lies in ~/distft/cluster, beside the package (see file_mounts in the YAML files). Values come from values.env.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
set -a
# shellcheck source=values.env
. "$home/cluster/values.env"
set +a
venv=$home/.venv
# Ray's daemons run from its package; its workers call themselves ray::NAME.
processes='^ray::|/site-packages/ray/'

fail() {
  echo "node.sh: $(hostname): $*" >&2
  exit 1
}

install_debs() {
  command -v apt-get >/dev/null || fail "please install $*"
  sudo apt-get -qq update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "$@"
}

mount_shared() {
  if [ -n "$DISTFT_STORAGE" ] && ! mountpoint -q "$DISTFT_SHARED"; then
    command -v mount.nfs4 >/dev/null || install_debs nfs-common
    sudo mkdir -p "$DISTFT_SHARED"
    # As AWS, Google and Azure advise for their NFS: wait for a server that is away rather than lose what was written.
    sudo mount -t nfs4 -o nfsvers=4.1,hard,timeo=600,retrans=2,noresvport "$DISTFT_STORAGE" "$DISTFT_SHARED"
    [ -w "$DISTFT_SHARED" ] || sudo chown "$(id -u):$(id -g)" "$DISTFT_SHARED"
  fi
  [ -w "$DISTFT_SHARED" ] || fail "cannot write to $DISTFT_SHARED, which every node must see; see DISTFT_STORAGE in cluster/values.env"
}

# Installs once: what was installed is noted last, so that an interrupted setup is taken up again.
setup() {
  local extras='' wanted
  mount_shared
  ! command -v nvidia-smi >/dev/null || extras='[gpu]'
  wanted=$(cat "$home/pyproject.toml" "$home/constraints.txt" && echo "$extras" "$@")
  [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ] || return 0
  python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || install_debs python3-venv
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -c "$home/constraints.txt" -e "$home$extras" "$@"
  echo "$wanted" >"$venv/installed"
}

# No token, no cluster: without one Ray would start open to everyone who reaches its ports.
environment() {
  [ -s ~/.ray/auth_token ] || fail "no ~/.ray/auth_token; make one where you call ray up: ray get-auth-token --generate"
  chmod 600 ~/.ray/auth_token
  if [ -e ~/.distft_env ]; then # secrets of jobs: NAME=VALUE lines
    chmod 600 ~/.distft_env
    set -a
    # shellcheck source=/dev/null
    . ~/.distft_env
    set +a
  fi
  export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
  export DISTFT_RUNS=$DISTFT_SHARED/runs DISTFT_CACHE=$DISTFT_SHARED/cache PATH=$venv/bin:$PATH
  unset OMP_NUM_THREADS # `ray up` sets it to 1 for its own commands, and every worker would inherit it
  ulimit -n 65536 2>/dev/null || true
}

# The head runs no work: its loss then ends no worker, and it can be small. Its dashboard, with the Jobs API, listens on
# loopback only; `ray dashboard FILE.yaml` makes a way there through SSH.
head() {
  environment
  ray stop >/dev/null
  # A lost host is noticed in 11 s rather than a minute: see distft/orchestrate/cluster.py.
  RAY_health_check_timeout_ms=3000 RAY_health_check_period_ms=500 RAY_health_check_failure_threshold=3 \
    ray start --head --port=6379 --num-cpus=0 --num-gpus=0 \
    --dashboard-host=127.0.0.1 --dashboard-port=8265 --autoscaling-config="$HOME/ray_bootstrap_config.yaml"
}

worker() {
  environment
  ray stop >/dev/null
  ray start --address="${RAY_HEAD_IP:?set by ray up}:6379"
}

stop() {
  "$venv/bin/ray" stop --grace-period 30 >/dev/null 2>&1 || true
  for signal in TERM KILL; do
    for _ in $(seq 20); do
      pgrep -u "$(id -u)" -f "$processes" >/dev/null || return 0
      sleep 0.5
    done
    pkill -"$signal" -u "$(id -u)" -f "$processes" || true
  done
  sleep 1
  ! pgrep -u "$(id -u)" -af "$processes" || fail "these processes of Ray do not end"
}

case ${1:-} in
setup | head | worker | stop) "$@" ;;
*)
  sed -n '2,8p' "${BASH_SOURCE[0]}" >&2
  exit 2
  ;;
esac
