#!/usr/bin/env bash
# Makes sure that the programs named on the command line are there, each a word of the table below:
#
#     scripts/debian-packages.sh venv compiler prometheus alertmanager chromium
#
# What is missing is installed with apt-get when that is possible (root, Debian). Otherwise the script says what is
# missing and which command installs it, and fails. Where nothing is missing it does nothing, quickly.
set -euo pipefail

python="${PYTHON:-python3.11}"
policy=/usr/sbin/policy-rc.d

have() { # program...: whether all of them are on the path
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || return 1
    done
}

is_there() { # need
    case "$1" in
        venv) "$python" -c 'import ensurepip, venv' 2>/dev/null ;;
        compiler) have cc c++ && echo '#include <stdio.h>' | cc -E - >/dev/null 2>&1 ;;
        prometheus) have prometheus && have promtool ;;
        alertmanager) have prometheus-alertmanager && have amtool ;;
        chromium) have chromium ;;
        openssl) have openssl ;;
        node) have node npm ;;
        *) echo "$0: unknown need '$1'" >&2; exit 2 ;;
    esac
}

packages_for() { # need
    case "$1" in
        venv) echo python3.11 python3.11-venv ;;
        compiler) echo gcc g++ libc6-dev ;;
        prometheus) echo prometheus ;;
        alertmanager) echo prometheus-alertmanager ;;
        openssl) echo openssl ;;
        node) echo nodejs npm ;;
        chromium) echo chromium fonts-dejavu-core ;; # a page without any font renders as boxes
    esac
}

# The Debian packages of the two servers start them, and again at every boot. The tests start their own on free ports
# and would only be in the way of a real one on port 9090: forbid the start while apt-get runs, and undo the enabling.
install_quietly() { # package...
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq -o Acquire::Retries=3
    apt-get install -qq --yes --no-install-recommends -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 \
        -o Dpkg::Use-Pty=0 "$@" </dev/null
    if [ -d /run/systemd/system ]; then
        local package
        for package in "$@"; do
            case "$package" in prometheus*) systemctl disable --quiet "$package.service" ;; esac
        done
    fi
}

missing=()
packages=()
for need in "$@"; do
    if ! is_there "$need"; then
        missing+=("$need")
        read -ra wanted <<<"$(packages_for "$need")"
        packages+=("${wanted[@]}")
    fi
done
[ "${#missing[@]}" -gt 0 ] || exit 0

if [ "$(id -u)" -ne 0 ] || ! have apt-get; then
    echo "missing on this machine: ${missing[*]}" >&2
    echo "install with, as root on Debian: apt-get install --no-install-recommends ${packages[*]}" >&2
    exit 1
fi

echo "installing Debian packages: ${packages[*]}"
install_quietly "${packages[@]}"
for need in "${missing[@]}"; do
    is_there "$need" || { echo "$need is still missing after apt-get install" >&2; exit 1; }
done
