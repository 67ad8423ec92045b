// In place of NVRTC: "compiles" a program to its own options, a line each, an empty line, and its
// text.
#include <cstring>
#include <string>

static std::string program, compiled;

extern "C" {
int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return 0;
}
const char* nvrtcGetErrorString(int) { return ""; }
int nvrtcCreateProgram(void** handle, const char* text, const char*, int, const char**,
                       const char**) {
  *handle = &program;
  program = text;
  return 0;
}
int nvrtcCompileProgram(void*, int count, const char** options) {
  compiled.clear();
  for (int i = 0; i < count; ++i) compiled += std::string(options[i]) + "\n";
  compiled += "\n" + program;
  return 0;
}
int nvrtcGetCUBINSize(void*, size_t* size) {
  *size = compiled.size();
  return 0;
}
int nvrtcGetCUBIN(void*, char* code) {
  std::memcpy(code, compiled.data(), compiled.size());
  return 0;
}
int nvrtcDestroyProgram(void**) { return 0; }
}
