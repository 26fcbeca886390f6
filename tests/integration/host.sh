#!/usr/bin/env bash
# Hosts on one machine, for test_hosts.py: each has an address, processes, /tmp/ray and /dev/shm of its own, and sees
# the same files otherwise. Needs root, iproute2 and util-linux; Linux only.
#
#   host.sh up I            starts host I (0..9) and prints its address
#   host.sh run I CMD ...   runs a command on it, in the current folder
#   host.sh cut I           pulls its cable; `join I` plugs it in again
#   host.sh down I          ends it as a loss of power does
#   host.sh clean           ends all hosts, and the network between them
#
# HOSTS_DIR, a folder, tells one set of hosts from another; HOSTS_NET is their network. What a plain network namespace
# lacks: Ray finds clusters through /tmp/ray and by the processes that it sees, so mounts and processes are apart too.
set -euo pipefail
: "${HOSTS_DIR:?a folder that is this set of hosts}"
net=${HOSTS_NET:-10.77.0}
bridge=dft$(cksum <<<"$HOSTS_DIR" | head -c 6)
mkdir -p "$HOSTS_DIR"

link() { echo "$bridge-$1"; }
pid() { cat "$HOSTS_DIR/host$1.pid"; }
run() {
  local i=$1
  shift
  exec nsenter -t "$(pid "$i")" -n -m -u -p -i --wd="$PWD" "$@"
}
inside() { (run "$@"); }

up() {
  local i=$1 outer
  if ! ip link show "$bridge" >/dev/null 2>&1; then
    ip link add "$bridge" type bridge
    ip addr add "$net.1/24" dev "$bridge"
    ip link set "$bridge" up
  fi
  mkdir -p "$HOSTS_DIR/ray$i" /tmp/ray
  # The first process of a host ends its children's zombies: Ray waits for the processes that it ended to be gone.
  setsid unshare -n -m -u -p -i -f --mount-proc --kill-child bash -c "
    mount --bind '$HOSTS_DIR/ray$i' /tmp/ray
    mount -t tmpfs -o size=${HOST_SHM:-1g} tmpfs /dev/shm
    hostname host$i
    ip link set lo up
    touch '$HOSTS_DIR/ready$i'
    while :; do sleep 3600 & wait -n; done" >/dev/null 2>&1 </dev/null &
  outer=$!
  for _ in $(seq 200); do
    [ -e "$HOSTS_DIR/ready$i" ] && break
    sleep 0.1
  done
  rm "$HOSTS_DIR/ready$i"
  pgrep -P "$outer" | head -1 >"$HOSTS_DIR/host$i.pid"
  ip link add "$(link "$i")" type veth peer name eth0 netns "$(pid "$i")"
  ip link set "$(link "$i")" master "$bridge" up
  inside "$i" ip addr add "$net.1$i/24" dev eth0
  inside "$i" ip link set eth0 up
  inside "$i" ip route add default via "$net.1"
  echo "$net.1$i"
}
cut() { ip link set "$(link "$1")" down; }
join() { ip link set "$(link "$1")" up; }
down() {
  ip link del "$(link "$1")" 2>/dev/null || true # first: nobody hears the ends of its connections
  kill -9 "$(pid "$1")" 2>/dev/null || true # the first process of its namespace: all others of it end too
  rm -f "$HOSTS_DIR/host$1.pid"
}
clean() {
  local file
  for file in "$HOSTS_DIR"/host*.pid; do
    [ -e "$file" ] || continue
    file=${file##*host}
    down "${file%.pid}"
  done
  ip link del "$bridge" 2>/dev/null || true
}
case ${1:-} in
up | run | down | cut | join | clean) "$@" ;;
*)
  sed -n '2,9p' "$0" >&2
  exit 2
  ;;
esac
