# SPDX-License-Identifier: MIT
# EDGEMOE_GGML_INCLUDE_DIR and EDGEMOE_GGML_LIBRARY_DIR: those of the llama-cpp-python that ${Python_EXECUTABLE} finds, if
# not set already.
if(NOT EDGEMOE_GGML_INCLUDE_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u, pathlib as p; print(p.Path(u.find_spec('llama_cpp').origin).parent)"
    OUTPUT_VARIABLE LLAMA_CPP_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE FAILED)
  if(FAILED)
    message(FATAL_ERROR "llama_cpp not found by ${Python_EXECUTABLE}: pip install llama-cpp-python==0.3.36")
  endif()
  cmake_path(GET LLAMA_CPP_DIR PARENT_PATH SITE_PACKAGES)
  set(EDGEMOE_GGML_INCLUDE_DIR "${SITE_PACKAGES}/include")
  set(EDGEMOE_GGML_LIBRARY_DIR "${LLAMA_CPP_DIR}/lib")
endif()
