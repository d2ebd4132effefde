#!/usr/bin/env bash
# Makes a CUDA toolkit in FOLDER from NVIDIA's wheels on PyPI (700 MB), enough to compile and link the `cuda` feature on a
# machine without one and without a GPU; quick where it is there already. Prints the settings that the build needs:
#   eval "$(scripts/cuda-toolkit.sh FOLDER)"
# To run on a GPU, the toolkit, libraries and driver of its machine serve; a build here fits them if the release is the same.
set -euo pipefail

folder=${1:?usage: $0 FOLDER}
# All of one release: headers of one and the compiler of another do not fit.
release=13.0
wheels=(
    "nvidia-cuda-nvcc==$release.88" "nvidia-nvvm==$release.88" "nvidia-cuda-crt==$release.88"
    "nvidia-cuda-cccl==$release.85" "nvidia-cuda-runtime==$release.96" "nvidia-cuda-nvrtc==$release.88"
    "nvidia-cublas==13.1.0.3" "nvidia-curand==10.4.0.35" "nvidia-nccl-cu13==2.27.7"
)

python=${PYTHON:-python3}
"$python" -m pip --version >/dev/null 2>&1 || {
    echo "$0 needs pip ($python -m pip): install python3-pip, or name another Python in PYTHON" >&2
    exit 1
}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
toolkit=$folder/nvidia/cu13

if [ "$(cat "$folder/complete" 2>/dev/null)" != "${wheels[*]}" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --no-compile --upgrade \
        --target "$folder" "${wheels[@]}" >&2
    chmod -R u+x "$toolkit"/bin "$toolkit"/nvvm/bin
    # Wheels hold libraries by their full version only, and no driver.
    ln -sfn lib "$toolkit/lib64"
    ln -sfn ../../nccl/lib/libnccl.so.2 "$toolkit/lib/libnccl.so.2"
    for library in "$toolkit"/lib/lib*.so.*; do
        name=${library##*/}
        ln -sfn "$name" "$toolkit/lib/${name%%.so.*}.so"
    done
    # The linker wants a libcuda; the real one comes with the driver. In this one every function answers
    # CUDA_ERROR_NO_DEVICE.
    mkdir -p "$toolkit/lib/stubs"
    grep -oE '\bcu[A-Z][A-Za-z0-9_]*' "$toolkit/include/cuda.h" | sort -u |
        sed 's/.*/int &(void) { return 100; }/' >"$folder/libcuda.c"
    "${CC:-cc}" -shared -fPIC -w "$folder/libcuda.c" -Wl,-soname,libcuda.so.1 -o "$toolkit/lib/stubs/libcuda.so.1"
    ln -sfn libcuda.so.1 "$toolkit/lib/stubs/libcuda.so"
    echo "${wheels[*]}" >"$folder/complete"
fi

# What candle's build finds as nvcc. Nine tenths of its work are kernels of quantised nets, which nothing here calls: it gets
# empty objects for them, and the linker drops what would call them. That saves ten minutes, and 50 MB in every program.
mkdir -p "$folder/quick/bin"
for part in include lib lib64; do
    ln -sfn "$toolkit/$part" "$folder/quick/$part"
done
cat >"$folder/quick/bin/nvcc" <<SCRIPT
#!/usr/bin/env bash
case " \$* " in
    *" -c "*/mmq_gguf/*.cu* | *" -c "*/moe/*.cu* | *" -c "*/mmvq_gguf.cu*)
        while [ "\$1" != -o ]; do shift; done
        exec "${CC:-cc}" -x c -c -fPIC /dev/null -o "\$2" ;;
esac
exec "$toolkit/bin/nvcc" "\$@"
SCRIPT
chmod +x "$folder/quick/bin/nvcc"

cat <<TEXT
export CUDA_HOME="$toolkit" CUDA_PATH="$toolkit" CUDA_ROOT="$toolkit" CUDA_TOOLKIT_ROOT_DIR="$toolkit"
export PATH="$folder/quick/bin:$toolkit/bin:\$PATH" LIBRARY_PATH="$toolkit/lib:$toolkit/lib/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-90}"
TEXT
