# Builds libddetr_cuda with one call of nvcc, as many files at a time as there are cores, and writes kernels.json, which says what was built and why not the rest.
# Run as a script by CMakeLists.txt, which sets: CUDA, ARCHITECTURES (with commas), SOURCE, LIBRARY, RECORD,
# HOST_COMPILER, COMPILER, ISAS (with commas).
cmake_minimum_required(VERSION 3.20)

function(quote_json text out)
  string(REGEX REPLACE "[\r\n\t]+" " " text "${text}")
  string(REPLACE "\\" "\\\\" text "${text}")
  string(REPLACE "\"" "\\\"" text "${text}")
  set(${out} "\"${text}\"" PARENT_SCOPE)
endfunction()

function(write_record built reason)
  quote_json("${COMPILER}" compiler)
  quote_json("${ISAS}" isas)
  quote_json("${built}" built)
  quote_json("${reason}" reason)
  file(WRITE ${RECORD} "{\"cpu\": {\"compiler\": ${compiler}, \"instruction_sets\": ${isas}}, "
                       "\"cuda\": {\"architectures\": ${built}, \"reason\": ${reason}}}\n")
endfunction()

function(stop_without_cuda reason)
  if(CUDA STREQUAL "require")
    message(FATAL_ERROR "CUDA kernels: ${reason}, but DDETR_CUDA=require.")
  endif()
  message(STATUS "CUDA kernels: none (${reason})")
  write_record("" "${reason}")
endfunction()

file(REMOVE ${LIBRARY})
if(CUDA STREQUAL "off")
  stop_without_cuda("DDETR_CUDA=off")
  return()
endif()

if(DEFINED ENV{CUDACXX})
  set(NVCC $ENV{CUDACXX})
else()
  find_program(NVCC nvcc PATHS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
endif()
if(NOT NVCC)
  stop_without_cuda("nvcc not found")
  return()
endif()

string(REPLACE "," ";" architectures "${ARCHITECTURES}")
if(architectures STREQUAL "")
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    RESULT_VARIABLE status OUTPUT_VARIABLE capabilities ERROR_QUIET
  )
  if(status EQUAL 0)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
    string(REPLACE "." "" architectures "${capabilities}")
    list(REMOVE_DUPLICATES architectures)
    list(SORT architectures COMPARE NATURAL)
  endif()
endif()
if(architectures STREQUAL "")
  set(architectures 75-virtual) # the driver compiles it for the GPU at first use
endif()

set(flags "")
set(built "")
foreach(architecture IN LISTS architectures)
  if(NOT architecture MATCHES "^([0-9]+)(-virtual)?$")
    message(FATAL_ERROR "DDETR_CUDA_ARCHITECTURES: '${architecture}' is not a number such as 90, or 75-virtual.")
  endif()
  set(number ${CMAKE_MATCH_1})
  if(NOT CMAKE_MATCH_2)
    list(APPEND flags -gencode arch=compute_${number},code=sm_${number})
    list(APPEND built sm_${number})
  endif()
endforeach()
# PTX of the last one also serves GPUs that are newer than all named
list(APPEND flags -gencode arch=compute_${number},code=compute_${number})
list(APPEND built "PTX compute_${number}")
list(JOIN built " " built)

file(GLOB sources ${SOURCE}/*.cu)
execute_process(
  COMMAND
    ${NVCC} -std=c++17 -O3 -shared -cudart static -ccbin ${HOST_COMPILER} -Xcompiler -fPIC,-fvisibility=hidden
    --threads 0 ${flags} -I${SOURCE}/include ${sources} ${SOURCE}/status.cpp -o ${LIBRARY}
  RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output
)
if(NOT status EQUAL 0 OR NOT EXISTS ${LIBRARY})
  file(REMOVE ${LIBRARY})
  message(STATUS "${output}")
  string(SUBSTRING "${output}" 0 300 output)
  string(STRIP "${output}" output)
  stop_without_cuda("${NVCC} failed with ${status}: ${output}")
  return()
endif()
message(STATUS "CUDA kernels: ${built}")
write_record("${built}" "")
