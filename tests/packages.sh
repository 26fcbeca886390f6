#!/bin/sh
# Debian's packages that tests need beside Python's: `sh tests/packages.sh browser` for those of `make test`, `slow` for
# the others too (hosts of their own, SSH, Slurm). Tests whose packages are missing are skipped, and say so.
set -eu
case "${1:-}" in
browser) packages="chromium chromium-driver" ;;
slow) packages="chromium chromium-driver iproute2 munge openssh-client openssh-server rsync slurm-client slurmctld slurmd util-linux" ;;
*)
    echo "usage: $0 browser|slow" >&2
    exit 2
    ;;
esac
missing=""
for package in $packages; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q "install ok installed" || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ]; then
    echo "as root: apt-get install$missing" >&2
    exit 1
fi
apt-get -qq update
# Services that come with them are not wanted: tests start their own.
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq install --yes --no-install-recommends $missing
