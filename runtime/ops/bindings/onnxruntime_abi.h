// The few entries of onnxruntime's C interface that a custom operator needs. Its headers ship neither
// with its Python package nor with Debian. The interface is a table of functions to which each
// version only appends, so the place of an entry is part of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pocketslm::ort {

constexpr uint32_t kApiVersion = 24;  // the first that shows an operator its session's settings

struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct Domain;
struct SessionOptions;
struct KeyValues;

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum ElementType { kFloat = 1, kUint8 = 2, kInt64 = 7, kFloat16 = 10 };
enum Characteristic { kRequired = 0, kVariadic = 2 };

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version_string)();
};

template <typename F>
F entry(const void* const* table, size_t index) {
  return reinterpret_cast<F>(const_cast<void*>(table[index]));
}

struct Api {
  explicit Api(const void* const* table)
      : create_status(entry<decltype(create_status)>(table, 0)),
        create_domain(entry<decltype(create_domain)>(table, 26)),
        domain_add(entry<decltype(domain_add)>(table, 27)),
        add_domain(entry<decltype(add_domain)>(table, 28)),
        tensor_data(entry<decltype(tensor_data)>(table, 51)),
        dimensions_count(entry<decltype(dimensions_count)>(table, 61)),
        dimensions(entry<decltype(dimensions)>(table, 62)),
        tensor_info(entry<decltype(tensor_info)>(table, 65)),
        input_count(entry<decltype(input_count)>(table, 88)),
        output_count(entry<decltype(output_count)>(table, 89)),
        input(entry<decltype(input)>(table, 90)),
        output(entry<decltype(output)>(table, 91)),
        release_tensor_info(entry<decltype(release_tensor_info)>(table, 99)),
        constant_input(entry<decltype(constant_input)>(table, 249)),
        get_value(entry<decltype(get_value)>(table, 297)),
        release_key_values(entry<decltype(release_key_values)>(table, 300)),
        config_entries(entry<decltype(config_entries)>(table, 391)) {}

  Status* (*const create_status)(ErrorCode, const char*);
  Status* (*const create_domain)(const char*, Domain**);
  Status* (*const domain_add)(Domain*, const struct CustomOp*);
  Status* (*const add_domain)(SessionOptions*, Domain*);
  Status* (*const tensor_data)(Value*, void**);
  Status* (*const dimensions_count)(const TensorInfo*, size_t*);
  Status* (*const dimensions)(const TensorInfo*, int64_t*, size_t);
  Status* (*const tensor_info)(const Value*, TensorInfo**);
  Status* (*const input_count)(const KernelContext*, size_t*);
  Status* (*const output_count)(const KernelContext*, size_t*);
  Status* (*const input)(const KernelContext*, size_t, const Value**);
  Status* (*const output)(KernelContext*, size_t, const int64_t*, size_t, Value**);
  void (*const release_tensor_info)(TensorInfo*);
  Status* (*const constant_input)(const KernelInfo*, size_t, int*, const Value**);
  const char* (*const get_value)(const KeyValues*, const char*);
  void (*const release_key_values)(KeyValues*);
  Status* (*const config_entries)(const KernelInfo*, KeyValues**);
};

// A custom operator as onnxruntime 1.16 knew it; `version` tells it that nothing follows.
struct CustomOp {
  uint32_t version = 16;
  void* (*create_unchecked)(const CustomOp*, const void*, const KernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*provider)(const CustomOp*) = nullptr;
  ElementType (*input_type)(const CustomOp*, size_t) = nullptr;
  size_t (*inputs)(const CustomOp*) = nullptr;
  ElementType (*output_type)(const CustomOp*, size_t) = nullptr;
  size_t (*outputs)(const CustomOp*) = nullptr;
  void (*compute_unchecked)(void*, KernelContext*) = nullptr;
  void (*destroy)(void*) = nullptr;
  Characteristic (*input_characteristic)(const CustomOp*, size_t) = nullptr;
  Characteristic (*output_characteristic)(const CustomOp*, size_t) = nullptr;
  int (*input_memory)(const CustomOp*, size_t) = nullptr;
  int (*variadic_input_minimum)(const CustomOp*) = nullptr;
  int (*variadic_input_same_type)(const CustomOp*) = nullptr;
  int (*variadic_output_minimum)(const CustomOp*) = nullptr;
  int (*variadic_output_same_type)(const CustomOp*) = nullptr;
  Status* (*create)(const CustomOp*, const void*, const KernelInfo*, void**) = nullptr;
  Status* (*compute)(void*, KernelContext*) = nullptr;
};

}  // namespace pocketslm::ort
