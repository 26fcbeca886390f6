#!/usr/bin/env bash
# Ends the cluster that `ray up` started from a file, and checks on each machine that no process of it is left; status 1
# and the machine's name where one is, or where a machine does not answer.
#
#   cluster/onprem-down.sh [FILE.yaml]    default: cluster/onprem.yaml
set -euo pipefail
file=${1:-$(dirname "${BASH_SOURCE[0]}")/onprem.yaml}
hosts=$(
  "$(dirname "$(command -v ray)")/python" - "$file" <<'PYTHON'
import os, sys, yaml
config = yaml.safe_load(open(sys.argv[1]))
key = config["auth"].get("ssh_private_key", "")
print(config["auth"]["ssh_user"], os.path.expanduser(key) or "-")
# The head first: its autoscaler would start the workers again.
print(config["provider"]["head_ip"], *config["provider"]["worker_ips"], sep="\n")
PYTHON
)
read -r user key <<<"${hosts%%$'\n'*}"
options=(-o BatchMode=yes -o ConnectTimeout=10 -o StrictHostKeyChecking=accept-new)
[ "$key" = - ] || options+=(-i "$key")
status=0
for host in ${hosts#*$'\n'}; do
  # shellcheck disable=SC2088 # the home is that of the other machine
  if ssh -n "${options[@]}" "$user@$host" '~/distft/cluster/node.sh stop'; then
    echo "$host: no process of Ray is left"
  else
    echo "$host: not ended, see above" >&2
    status=1
  fi
done
exit "$status"
