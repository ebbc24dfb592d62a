// Outcome of a host entry point. No exceptions and no CUDA types cross this border, so that the
// binding file compiles without CUDA headers and decides alone which Python exception to raise.
#pragma once

#include <string>

namespace coachhook {

enum class Code { kOk, kInvalidArgument, kCudaError };

struct Status {
  Code code = Code::kOk;
  std::string message;

  bool ok() const { return code == Code::kOk; }
};

// "<op>: <argument> must be <expected>, got <received>"
inline Status invalid(const char* op, const char* argument, const char* expected,
                      long long received) {
  return {Code::kInvalidArgument, std::string(op) + ": " + argument + " must be " + expected +
                                      ", got " + std::to_string(received)};
}

}  // namespace coachhook

// Returns from the enclosing function, which must return Status, unless `condition` holds.
#define COACHHOOK_REQUIRE(condition, op, argument, expected, received)                       \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      return ::coachhook::invalid(op, argument, expected, static_cast<long long>(received)); \
    }                                                                                        \
  } while (0)
