# The dense layers of libddetr_cpu (include/ddetr_dense.h): one copy of the kernels per engine. Included by
# CMakeLists.txt. There are none for other processors than x86-64: PyTorch's own layers run there.
include(CheckCXXCompilerFlag)

target_sources(ddetr_cpu PRIVATE dense_cpu.cpp)

function(add_dense_kernels name)
  add_library(dense_${name} OBJECT dense_cpu_kernels.cpp)
  target_include_directories(dense_${name} PRIVATE include)
  target_compile_definitions(dense_${name} PRIVATE DDETR_DENSE_KERNELS=ddetr_dense_${name})
  target_compile_options(dense_${name} PRIVATE ${DDETR_CXX_FLAGS} ${DDETR_KERNEL_FLAGS} ${ARGN})
  target_sources(ddetr_cpu PRIVATE $<TARGET_OBJECTS:dense_${name}>)
endfunction()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  set(bf16 -mavx512bf16 -mamx-tile -mamx-bf16) # all three from the same compilers on: GCC 11, clang 12
  add_dense_kernels(f32_avx2 ${avx2})
  add_dense_kernels(f32_avx512 ${avx512})
  check_cxx_compiler_flag("-mavx512bf16 -mamx-tile -mamx-bf16" DDETR_COMPILER_HAS_AMX)
  if(DDETR_COMPILER_HAS_AMX)
    add_dense_kernels(bf16_avx512 ${avx512} -mavx512bf16 -DDDETR_ENGINE_BF16)
    add_dense_kernels(bf16_amx ${avx512} ${bf16} -DDDETR_ENGINE_AMX)
    add_dense_kernels(f32_amx ${avx512} ${bf16} -DDDETR_ENGINE_SPLIT)
    target_compile_definitions(ddetr_cpu PRIVATE DDETR_HAVE_AMX)
  endif()
endif()
