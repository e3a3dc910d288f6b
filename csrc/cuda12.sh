#!/bin/sh
# A CUDA 12.4 toolkit in a folder, from Debian 13's packages (component non-free), nothing installed:
#
#   apt-get download nvidia-cuda-toolkit nvidia-cuda-dev libcu++-dev libthrust-dev libcub-dev
#   sh csrc/cuda12.sh FOLDER *.deb
#   CUDA_HOME=FOLDER python csrc/build.py
#
# Of the packages it takes the compiler, the headers and the static runtime. The host compiler must be
# gcc 13 or older.
set -eu
test $# -gt 1 || { echo "usage: cuda12.sh FOLDER PACKAGE.deb..." >&2; exit 2; }
folder=$1
shift
mkdir -p "$folder/nvvm/bin" "$folder/lib64"
scratch=$(mktemp -d "$folder/unpack.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
for package; do
  # tar complains of patterns that a package has nothing for; what is missing shows below
  dpkg --fsys-tarfile "$package" | tar -x -C "$scratch" --wildcards './usr/bin/*' \
    './usr/include/*' './usr/lib/nvidia-cuda-toolkit/*' '*/libcudart_static.a' \
    '*/libcudadevrt.a' 2> /dev/null || :
done
compiler=$scratch/usr/lib/nvidia-cuda-toolkit
mv "$scratch/usr/bin" "$scratch/usr/include" "$folder/"
mv -f "$compiler/bin/nvcc" "$compiler/bin/crt" "$folder/bin/"
mv "$compiler/bin/cicc" "$folder/nvvm/bin/"
mv "$compiler/libdevice" "$folder/nvvm/"
mv "$scratch"/usr/lib/*/libcuda*.a "$folder/lib64/"
cat > "$folder/bin/nvcc.profile" << 'END'
TOP                = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH              += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES          += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES         =+ $(_SPACE_) "-L$(TOP)/lib64"
END
test -f "$folder/lib64/libcudart_static.a"
test -f "$folder/include/thrust/complex.h"
"$folder/bin/nvcc" --version
