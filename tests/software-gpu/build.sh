#!/usr/bin/env bash
# Makes a software GPU in FOLDER: CUDA's libraries and compiler, as far as the feature `cuda` uses them, that run on the CPU.
# Prints the settings to build and run with:
#   eval "$(tests/software-gpu/build.sh FOLDER)" && cargo test --release --features cuda
set -euo pipefail

folder=${1:?usage: $0 FOLDER}
mkdir -p "$folder"/{bin,lib,include}
folder=$(cd "$folder" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
kernels=$here/../../src/ops/cuda
cargo=${CARGO_HOME:-$HOME/.cargo}

# What CUDA's libraries have and this one has not. It ends the program if it is called.
bindings=$(dirname "$(find "$cargo"/registry/src/*/ -path '*/cudarc-0.19*/src/driver/sys/mod.rs' | sort | tail -n 1)")/../..
functions=$(sed -nE 's/^.*\bfn (cu[A-Z]|cublas|curand|cuda|nccl|nvrtc)([A-Za-z0-9_]*)\(.*/\1\2/p' "$bindings"/{driver,cublas,cublaslt,curand,nccl,nvrtc,runtime}/sys/mod.rs | sort -u)
{
    echo '#include <stdio.h>'
    echo '#include <stdlib.h>'
    echo '#define MISSING(name) __attribute__((weak)) int name(void) { fprintf(stderr, "software GPU: %s is not written\n", #name); abort(); }'
    echo "$functions" | sed 's/.*/MISSING(&)/'
} >"$folder/missing.c"
"${CC:-cc}" -c -fPIC -o "$folder/missing.o" "$folder/missing.c"

"${CXX:-g++}" -std=c++20 -O3 -march=native -Wall -Wextra -Wno-unknown-pragmas -U_FORTIFY_SOURCE -DVCYCLE_EMULATE -shared -fPIC \
    -I "$kernels/emulate" -x c++ "$kernels"/*.cu "$here"/*.cpp -x none "$folder/missing.o" -Wl,-soname,libsoftwaregpu.so -o "$folder/lib/libsoftwaregpu.so"
for name in cuda cudart cublas cublasLt curand nccl nvrtc; do
    ln -sfn libsoftwaregpu.so "$folder/lib/lib$name.so"
done
ln -sfn lib "$folder/lib64"

# Compiles nothing: this project's kernels are in the library, candle's are known by their names.
cat >"$folder/bin/nvcc" <<'SCRIPT'
#!/usr/bin/env bash
case " $* " in
    # The release stands in the fourth line, where it is looked for.
    *" --version "*) printf 'nvcc\nof a software GPU\n\nCuda compilation tools, release 13.0, V13.0.88\n' && exit ;;
    *" --list-gpu-code "*) printf 'sm_80\nsm_90\n' && exit ;;
esac
out= folder= kind=objects sources=()
while [ $# -gt 0 ]; do
    case $1 in
        -o) out=$2 && shift ;;
        --output-directory) folder=$2 && shift ;;
        -ptx | --ptx) kind=texts ;;
        -lib | --lib) kind=library ;;
        *.cu) sources+=("$1") ;;
    esac
    shift
done
case $kind in
    texts)
        for source in "${sources[@]}"; do
            name=${source##*/}
            echo "// nothing" >"$folder/${name%.cu}.ptx"
        done
        ;;
    objects) "${CC:-cc}" -x c -c -fPIC /dev/null -o "$out" ;;
    library)
        "${CC:-cc}" -x c -c -fPIC /dev/null -o "$out.o"
        rm -f "$out"
        ar rc "$out" "$out.o"
        ;;
esac
SCRIPT
chmod +x "$folder/bin/nvcc"

cat <<TEXT
export CUDA_HOME="$folder" CUDA_PATH="$folder" CUDA_ROOT="$folder" CUDA_TOOLKIT_ROOT_DIR="$folder" NVCC="$folder/bin/nvcc"
export PATH="$folder/bin:\$PATH" LIBRARY_PATH="$folder/lib\${LIBRARY_PATH:+:\$LIBRARY_PATH}" LD_LIBRARY_PATH="$folder/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export CUDA_COMPUTE_CAP=90
TEXT
