#!/usr/bin/env bash
# Installs what mill's demo and tests need on Debian 12: packages by apt, then .venv from the lock.
# Says in one line what is missing where this machine cannot do it.
# BENCH_PACKAGES, where it is set, is all that is installed: what `make bench` needs on top.
set -euo pipefail

missing() { echo "error: $1" >&2; exit 1; }

free_kb=$(df --output=avail -k . | tail -n 1)
[ "$free_kb" -ge $((3 * 1024 * 1024)) ] || missing "3 GB of free disk are needed here, there are $((free_kb / 1024)) MB"

wanted=()
for package in ${BENCH_PACKAGES:-$PACKAGES}; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || wanted+=("$package")
done
if [ ${#wanted[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || missing "these Debian packages are needed: ${wanted[*]}"
  [ "$(id -u)" = 0 ] || missing "root is needed to install ${wanted[*]}: run it with sudo"
  echo "installing ${wanted[*]}"
  # Services that packages bring are of no use here: mill starts its own, with its own folders.
  # etcd's would be enabled and started by systemd: what is masked before it comes stays down.
  if [[ " ${wanted[*]} " == *" etcd-server "* && ! -e /etc/systemd/system/etcd.service ]]; then
    mkdir -p /etc/systemd/system && ln -sf /dev/null /etc/systemd/system/etcd.service
  fi
  log=$(mktemp)
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
      apt-get install -y -qq --no-install-recommends "${wanted[@]}"; } >"$log" 2>&1 \
    || { tail -n 5 "$log" >&2; missing "apt-get could not install ${wanted[*]}"; }
  rm -f "$log"
fi
[ -z "${BENCH_PACKAGES:-}" ] || exit 0

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || missing "Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" --version)"
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || missing "python3-venv does not work"
echo "installing Python packages into .venv (a minute the first time)"
.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
  -r requirements.lock || missing "pip could not install requirements.lock"
# Editable, by a path file: what runs is this checkout.
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
pwd > "$site/mill.pth"
printf '#!%s/.venv/bin/python\nfrom reconciler.cli.main import main\nmain()\n' "$(pwd)" > .venv/bin/mill
chmod +x .venv/bin/mill
# The grammar's tables are made once, by whoever installs: later every process starts fast.
.venv/bin/python -m reconciler.language.warm
