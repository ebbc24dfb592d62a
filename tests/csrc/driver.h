// What the host drivers share: a case on standard input, the results on standard output. Every
// array lives in its own heap block of exactly its size, so that ASan sees any access outside.
// Memory that the kernels must write starts as 0xff bytes: NaN in the floats, 255 in `fired`.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "common/status.h"

namespace {

using Bytes = std::unique_ptr<char[]>;

void read(void* to, size_t size) {
  if (std::fread(to, 1, size, stdin) != size) {
    std::fprintf(stderr, "driver: input ends early\n");
    std::exit(2);
  }
}

int64_t read_int() {
  int64_t value;
  read(&value, sizeof(value));
  return value;
}

// An array is its size in bytes, then the bytes; size 0 stands for a null pointer.
Bytes read_array() {
  const int64_t size = read_int();
  if (size == 0) return nullptr;
  Bytes bytes(new char[size]);
  read(bytes.get(), size);
  return bytes;
}

Bytes unwritten(size_t size) {
  Bytes bytes(new char[size]);
  std::memset(bytes.get(), 0xff, size);
  return bytes;
}

void write(const void* from, size_t size) { std::fwrite(from, 1, size, stdout); }

void finish(const coachhook::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message.c_str());
  std::exit(3);
}

}  // namespace
