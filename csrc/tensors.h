// Torch's tensors by DLPack's table of C functions, which torch has from 2.10 on: address, shape and type in some 30
// ns, where each attribute takes Python 50. For calls on plain tensors: `<op>_plain` does one, or returns false and has
// done nothing, and then Python looks at the arguments, says what is wrong with them, or does what there is to do
// besides.
#pragma once
#include <cmath>

#include "bindings.h"

namespace dlpack {  // github.com/dmlc/dlpack, version 1, of which these are the parts that are read

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;
  void *allocate, *managed_from_python, *managed_to_python;
  int (*read)(void* object, Tensor* out);  // not owned; no stream is waited for
  void* current_stream;
};

}  // namespace dlpack

struct TorchTensors {
  PyObject* type = nullptr;  // torch.Tensor
  PyObject* parameter = nullptr;  // torch.nn.Parameter, which no Plain is
  int (*read)(void*, dlpack::Tensor*) = nullptr;
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
};
inline TorchTensors torch_tensors;

// Whether torch.Tensor can be read so; before, nothing is a plain tensor.
inline bool read_tensors_of(py::object type, py::object parameter) {
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return false;
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* table = static_cast<dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!table) throw py::error_already_set();
  if (table->major != 1 || !table->read) return false;
  torch_tensors.read = table->read;
  torch_tensors.type = type.release().ptr();
  torch_tensors.parameter = parameter.release().ptr();
  return true;
}

// Whether a tensor lies where it lay, as Python's numbers say: 1 or 0; -1 where Python has to be asked.
inline int lies_at(PyObject* t, PyObject* address, PyObject* shape, PyObject* strides) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(t));
  if (!torch_tensors.read || (type != torch_tensors.type && type != torch_tensors.parameter)) return -1;
  dlpack::Tensor now;
  if (torch_tensors.read(t, &now) || !now.strides) {
    PyErr_Clear();
    return -1;
  }
  if (static_cast<char*>(now.data) + now.byte_offset != PyLong_AsVoidPtr(address)) return 0;
  if (now.dims != PyTuple_GET_SIZE(shape) || now.dims != PyTuple_GET_SIZE(strides)) return 0;
  for (int d = 0; d < now.dims; d++) {
    if (now.shape[d] != PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d))) return 0;
    if (now.strides[d] != PyLong_AsLongLong(PyTuple_GET_ITEM(strides, d))) return 0;
  }
  return 1;
}

// A tensor whose memory on the CPU holds its values, one after the other; of no subclass, not empty, and, under
// `gradients`, without one.
class Plain {
 public:
  enum Type { f32, f64, bf16, f16, i64, other };  // fk::Dtype, and indices

  explicit Plain(py::handle t, bool gradients = false) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(t.ptr())) != torch_tensors.type) return;
    if (torch_tensors.read(t.ptr(), &tensor_)) {
      PyErr_Clear();
      return;
    }
    const bool on_cpu = tensor_.device_type == 1 && tensor_.lanes == 1 && tensor_.data;
    ok_ = on_cpu && is_contiguous() && !says(PyObject_CallMethodNoArgs(t.ptr(), torch_tensors.is_neg)) &&
          !(gradients && says(PyObject_GetAttr(t.ptr(), torch_tensors.requires_grad)));
  }

  explicit operator bool() const { return ok_; }
  int dims() const { return tensor_.dims; }
  int64_t size(int d) const { return d < dims() ? tensor_.shape[d] : -1; }
  int64_t count() const { return count_; }
  int64_t count_from(int first) const {  // of the elements of dimensions from the first on
    int64_t n = 1;
    for (int d = first; d < dims(); d++) n *= size(d);
    return n;
  }
  bool is(int dims, int64_t length) const { return this->dims() == dims && size(0) == length; }
  bool is_like(const Plain& x) const { return has_sizes(0, x, 0); }
  bool has_sizes(int from, const Plain& x, int x_from) const {  // the same dimensions from these on
    if (dims() - from != x.dims() - x_from || dims() < from) return false;
    for (int d = from; d < dims(); d++) {
      if (size(d) != x.size(d - from + x_from)) return false;
    }
    return true;
  }

  Type type() const {
    if (tensor_.code == 2)
      return tensor_.bits == 32 ? f32 : tensor_.bits == 64 ? f64 : tensor_.bits == 16 ? f16 : other;
    return tensor_.code == 4 ? bf16 : tensor_.code == 0 && tensor_.bits == 64 ? i64 : other;
  }
  bool is_state() const { return type() == f32 || type() == f64; }
  bool is_velocity_of(const Plain& x) const {  // its type may stand beside that state's
    return x.type() == f64 ? type() == f64 : type() == f32 || type() == bf16 || type() == f16;
  }
  fk::Dtype dtype() const { return fk::Dtype(type()); }

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(tensor_.data) + tensor_.byte_offset);
  }

 private:
  static bool says(PyObject* answer) {  // an error is a yes: it is Python's to look at
    const bool yes = answer != Py_False;
    if (!answer) PyErr_Clear();
    Py_XDECREF(answer);
    return yes;
  }

  bool is_contiguous() {
    count_ = 1;
    for (int d = dims() - 1; d >= 0; d--) {
      if (size(d) != 1 && tensor_.strides && tensor_.strides[d] != count_) return false;
      count_ *= size(d);
    }
    return count_ > 0;
  }

  dlpack::Tensor tensor_;
  int64_t count_ = 0;
  bool ok_ = false;
};

// Numbers in float64, of a vector of these or of float32.
class Doubles {
 public:
  explicit Doubles(const Plain& t) {
    if (t.type() == Plain::f64) {
      at_ = t.data<double>();
      return;
    }
    const float* from = t.data<float>();
    own_.assign(from, from + t.count());
    at_ = own_.data();
  }
  const double* data() const { return at_; }

 private:
  std::vector<double> own_;
  const double* at_ = nullptr;
};

// Times as `_checks.expect_times` has them.
inline bool are_times(const Plain& t) {
  if (!t || t.type() != Plain::f64 || t.dims() != 1 || t.count() < 2) return false;
  const double *values = t.data<double>(), last = values[t.count() - 1];
  for (int64_t i = 1; i < t.count(); i++) {
    if (!(values[i - 1] < values[i])) return false;
  }
  return values[0] >= -1e-12 && std::fabs(last - 1) <= 1e-12;
}

// Whether it is a number, and that is 1.
inline bool is_one(py::handle tensor) {
  const Plain t(tensor);
  if (!t || t.dims() != 0) return false;
  return t.type() == Plain::f32 ? *t.data<float>() == 1 : t.type() == Plain::f64 && *t.data<double>() == 1;
}

// 1 or 0: whether no element is NaN or Inf; -1: it is not known here.
inline int is_finite(py::handle tensor) {
  const Plain t(tensor);
  if (!t || t.count() > 1 << 15) return -1;
  uint64_t bad = 0;
  if (t.type() == Plain::f32) {
    const auto* bits = t.data<uint32_t>();
    for (int64_t i = 0; i < t.count(); i++) bad |= (bits[i] & 0x7f800000u) == 0x7f800000u;
  } else if (t.type() == Plain::f64) {
    const auto* bits = t.data<uint64_t>();
    for (int64_t i = 0; i < t.count(); i++) bad |= (bits[i] & 0x7ff0000000000000u) == 0x7ff0000000000000u;
  } else {
    return -1;
  }
  return !bad;
}
