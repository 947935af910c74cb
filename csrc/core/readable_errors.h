// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>

// The text of the last error of a torch function on this thread. Null before torch 2.13, which introduced it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

// Throws an error if the condition is false; the other arguments make up its message. The message of STD_TORCH_CHECK
// begins with a path of the machine that built it.
#define MMDCN_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::mmdcn::fail(__VA_ARGS__); \
  } while (false)

namespace mmdcn {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Calls body and adds torch's own message to its errors. Through the ABI of torch 2.10, a torch function that fails,
// for example out of memory, reports only where it was called.
template <typename Body>
auto with_readable_errors(const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    const std::string where = error.what();
    const bool from_torch = where.find("API call failed") != std::string::npos;
    if (!from_torch || !torch_exception_get_what_without_backtrace) throw;
    throw std::runtime_error(torch_exception_get_what_without_backtrace() + ("\n" + where));
  }
}

// Wraps an operator in with_readable_errors.
template <auto kOperator>
struct Readable;

template <typename Result, typename... Args, Result (*kOperator)(Args...)>
struct Readable<kOperator> {
  static Result call(Args... args) {
    return with_readable_errors([&] { return kOperator(args...); });
  }
};

}  // namespace mmdcn
