#!/usr/bin/env bash
# Installs what vcycle is built with, as far as it is missing, and with `test` what it is tested with; quick where nothing
# is missing. It uses apt-get with root or sudo; elsewhere it says what is missing and exits 1.
set -euo pipefail

# A line a dependency: what for | how it is found | Debian, Ubuntu | Fedora, RHEL | environment module.
c_compiler() { command -v cc; }
pkg_config() { command -v pkg-config; }
open_mpi() { command -v mpicc && command -v mpirun; }
hdf5() {
    [ -n "${HDF5_DIR:-}" ] || command -v h5cc || command -v h5pcc || pkg-config --exists hdf5 ||
        pkg-config --exists hdf5-serial
}
# Where bindgen looks. Neither llvm-config nor libclang-cpp says that libclang itself is there.
libclang() {
    local folder
    [ -z "${LIBCLANG_PATH:-}" ] || return 0
    for folder in "$(llvm-config --libdir)" /usr/lib/llvm-*/lib /usr/lib /usr/lib64 /usr/lib/*-linux-gnu; do
        if compgen -G "$folder/libclang.so*" || compgen -G "$folder/libclang-[0-9]*.so*"; then return 0; fi
    done
    return 1
}
cxx_compiler() { command -v g++; }
h5py() { python3 -c 'import h5py' || /usr/bin/python3 -c 'import h5py'; }
dependencies='
C compiler|c_compiler|gcc libc6-dev|gcc|gcc
pkg-config|pkg_config|pkg-config|pkgconf-pkg-config|-
MPI with its headers|open_mpi|libopenmpi-dev openmpi-bin|openmpi-devel|openmpi
HDF5 with its headers|hdf5|libhdf5-dev|hdf5-devel|hdf5
libclang, which bindgen reads C headers with|libclang|libclang-dev|clang-devel|llvm
'
[ "${1:-}" != test ] || dependencies+='C++ compiler, for the tests of CUDA kernels|cxx_compiler|g++|gcc-c++|gcc
h5py, for a test that reads checkpoints|h5py|python3-h5py|python3-h5py|-
'

missing() {
    local what check debian fedora module
    while IFS='|' read -r what check debian fedora module; do
        [ -z "$what" ] || "$check" >/dev/null 2>&1 || echo "$what|$debian|$fedora|$module"
    done <<<"$dependencies"
}

# Column $1 of the missing ones, separated by $2.
names() { cut -d'|' -f"$1" <<<"$lacking" | sed '/^-$/d' | paste -sd "${2:- }"; }

give_up() {
    cat >&2 <<TEXT
$1
missing: $(names 1 ';')
  Debian, Ubuntu:       apt-get install $(names 2)
  Fedora, RHEL:         dnf install $(names 3)
  environment modules:  module load $(names 4)
TEXT
    exit 1
}

# apt-get as root, or through sudo where it is allowed or can ask.
apt() {
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; } || return 1
        as_root=(sudo)
    fi
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get "$@"
}

install() {
    local packages
    read -ra packages <<<"$(names 2)"
    apt install -y --no-install-recommends "${packages[@]}" && return
    # The package lists may be missing or old.
    apt update && apt install -y --no-install-recommends "${packages[@]}"
}

command -v cargo >/dev/null || {
    echo "cargo is missing: install Rust's toolchain, https://rustup.rs" >&2
    exit 1
}
lacking=$(missing)
[ -n "$lacking" ] || exit 0
command -v apt-get >/dev/null || give_up "Packages can be installed only by apt-get here, and there is none."
echo "installing $(names 2)"
install || give_up "apt-get could not install what is missing (no root and no sudo, or no network)."
lacking=$(missing)
[ -z "$lacking" ] || give_up "Still missing after apt-get:"
