// Whether what a recorded loop has taken in of a velocity is as it was: flowkernels/sampling/state.py, whose
// `holds_reference` this is, mark for mark. A few nanoseconds for a setting, some hundred for a tensor.
#include <cmath>
#include <vector>

#include "tensors.h"
#include "watch/watch.h"

namespace {

class Ref {
 public:
  explicit Ref(PyObject* owned) : p_(owned) {}
  Ref(Ref&& other) noexcept : p_(other.p_) { other.p_ = nullptr; }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(p_); }
  PyObject* get() const { return p_; }
  explicit operator bool() const { return p_ != nullptr; }

 private:
  PyObject* p_;
};

Ref borrowed(PyObject* p) {
  Py_XINCREF(p);
  return Ref(p);
}

struct Names {
#define FK_NAME(name) PyObject* name = PyUnicode_InternFromString(#name)
  FK_NAME(data_ptr);
  FK_NAME(dtype);
  FK_NAME(shape);
  FK_NAME(stride);
  FK_NAME(is_conj);
  FK_NAME(is_neg);
  FK_NAME(func);
  FK_NAME(args);
  FK_NAME(keywords);
#undef FK_NAME
};

// In the order of flowkernels/sampling/state.py
enum Kind {
  SAME,
  WEAK,
  STRONG,
  TENSOR,
  WRAPPER,
  SPARSE,
  DICT,
  ORDERED,
  ITEMS,
  LENGTH,
  AGAIN,
  MODULE,
  METHOD,
  FUNCTION,
  PARTIAL
};

bool equal(PyObject* a, PyObject* b) {
  return a == b || PyObject_RichCompareBool(a, b, Py_EQ) > 0;
}

// Numbers and texts by their values, also those in tuples.
bool same_key(PyObject* now, PyObject* then) {
  if (now == then) return true;
  if (Py_TYPE(now) != Py_TYPE(then)) return false;
  if (PyTuple_CheckExact(now)) {
    const Py_ssize_t n = PyTuple_GET_SIZE(now);
    bool same = n == PyTuple_GET_SIZE(then);
    for (Py_ssize_t i = 0; same && i < n; i++) same = same_key(PyTuple_GET_ITEM(now, i), PyTuple_GET_ITEM(then, i));
    return same;
  }
  return (PyUnicode_CheckExact(now) || PyLong_CheckExact(now) || PyBytes_CheckExact(now)) && equal(now, then);
}

bool same_setting(PyObject* now, PyObject* then) {
  if (now == then) return true;
  if (Py_TYPE(now) != Py_TYPE(then)) return false;
  if (!PyFloat_CheckExact(now)) return equal(now, then);
  const double a = PyFloat_AS_DOUBLE(now), b = PyFloat_AS_DOUBLE(then);
  return a == b ? std::signbit(a) == std::signbit(b) : std::isnan(a) && std::isnan(b);
}

bool is_target(PyObject* weak, PyObject* value) {
  if (value == Py_None) return false;  // which a dead reference gives
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* target = nullptr;
  PyWeakref_GetRef(weak, &target);
  Py_XDECREF(target);
  return target == value;  // which is alive
#else
  return PyWeakref_GET_OBJECT(weak) == value;
#endif
}

bool type_is(PyObject* value, PyObject* type) {
  return reinterpret_cast<PyObject*>(Py_TYPE(value)) == type;
}

class Walk {
 public:
  explicit Walk(const Names& names) : names_(names) {}

  bool holds(PyObject* marks, PyObject* roots) {
    push_all(roots);
    const Py_ssize_t n = PyTuple_GET_SIZE(marks);
    for (Py_ssize_t i = 0; i < n; i++) {
      if (todo_.empty()) return false;
      const Ref value(std::move(todo_.back()));
      todo_.pop_back();
      if (!value || !is(value.get(), PyTuple_GET_ITEM(marks, i))) return false;
    }
    return todo_.empty();
  }

 private:
  void push(PyObject* p) { todo_.push_back(borrowed(p)); }

  void push_all(PyObject* tuple) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) push(PyTuple_GET_ITEM(tuple, i));
  }

  void push_attribute(PyObject* value, PyObject* name) { todo_.emplace_back(PyObject_GetAttr(value, name)); }

  void push_made(PyObject* value, PyObject* method) { todo_.emplace_back(PyObject_CallMethodNoArgs(value, method)); }

  // `mark` holds of `value`, whose parts are pushed.
  bool is(PyObject* value, PyObject* mark) {
    PyObject* a = PyTuple_GET_SIZE(mark) > 1 ? PyTuple_GET_ITEM(mark, 1) : nullptr;
    PyObject* b = PyTuple_GET_SIZE(mark) > 2 ? PyTuple_GET_ITEM(mark, 2) : nullptr;
    switch (PyLong_AsLong(PyTuple_GET_ITEM(mark, 0))) {
      case SAME: return same_setting(value, a);
      case WEAK: return is_target(a, value);
      case STRONG: return value == a;
      case TENSOR: return type_is(value, a) && is_tensor(value, mark);
      case WRAPPER:
        if (!is_target(a, value)) return false;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(b); i++) push_attribute(value, PyTuple_GET_ITEM(b, i));
        return true;
      case SPARSE:
        if (!is_target(a, value)) return false;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(b); i++) push_made(value, PyTuple_GET_ITEM(b, i));
        return true;
      case DICT: return number(value) && PyDict_CheckExact(value) && is_dict(value, a, nullptr);
      case ORDERED: return number(value) && is_ordered(value, a);
      case ITEMS: return number(value) && type_is(value, a) && is_items(value, b);
      case LENGTH: return number(value) && type_is(value, a) && PyObject_Size(value) == PyLong_AsSsize_t(b);
      case AGAIN: return value == containers_[PyLong_AsSize_t(a)].get();
      case MODULE: {
        if (!is_target(a, value) || !is_target(PyTuple_GET_ITEM(mark, 4), (PyObject*)Py_TYPE(value))) return false;
        const Ref held(PyObject_GenericGetDict(value, nullptr));
        return held && is_dict(held.get(), b, PyBytes_AS_STRING(PyTuple_GET_ITEM(mark, 3)));
      }
      case METHOD:
        if (!PyMethod_Check(value)) return false;
        push(PyMethod_GET_FUNCTION(value));
        push(PyMethod_GET_SELF(value));
        return true;
      case FUNCTION:
        return is_target(a, value) && is_function(value, b, PyTuple_GET_ITEM(mark, 3), PyTuple_GET_ITEM(mark, 4));
      case PARTIAL:
        if (!is_target(a, value)) return false;
        push_attribute(value, names_.func);
        push_attribute(value, names_.args);
        push_attribute(value, names_.keywords);
        return true;
    }
    return false;
  }

  // Containers are numbered as they come, for AGAIN.
  bool number(PyObject* container) {
    containers_.push_back(borrowed(container));
    return true;
  }

  bool is_tensor(PyObject* t, PyObject* mark) {
    auto is = [mark](int i, const Ref& now) { return now && equal(now.get(), PyTuple_GET_ITEM(mark, i)); };
    const int known = lies_at(t, PyTuple_GET_ITEM(mark, 2), PyTuple_GET_ITEM(mark, 4), PyTuple_GET_ITEM(mark, 5));
    if (known == 0 || !is(3, Ref(PyObject_GetAttr(t, names_.dtype))) ||
        !is(6, Ref(PyObject_CallMethodNoArgs(t, names_.is_conj))) ||
        !is(7, Ref(PyObject_CallMethodNoArgs(t, names_.is_neg))))
      return false;
    return known > 0 ||
           (is(2, Ref(PyObject_CallMethodNoArgs(t, names_.data_ptr))) &&
            is(4, Ref(PyObject_GetAttr(t, names_.shape))) && is(5, Ref(PyObject_CallMethodNoArgs(t, names_.stride))));
  }

  // read: of each value whether it is a part; null: all are.
  bool is_dict(PyObject* dict, PyObject* keys, const char* read) {
    const Py_ssize_t n = PyTuple_GET_SIZE(keys);
    if (PyDict_GET_SIZE(dict) != n) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0, i = 0;
    for (; i < n && PyDict_Next(dict, &at, &key, &value); i++) {
      if (!same_key(key, PyTuple_GET_ITEM(keys, i))) return false;
      if (!read || read[i]) push(value);
    }
    return i == n;
  }

  bool is_ordered(PyObject* dict, PyObject* keys) {  // its own order is not that of the dict below it
    if (!PyDict_Check(dict) || PyDict_CheckExact(dict)) return false;
    const Ref now(PySequence_Tuple(dict));
    const Py_ssize_t n = PyTuple_GET_SIZE(keys);
    if (!now || PyTuple_GET_SIZE(now.get()) != n) return false;
    for (Py_ssize_t i = 0; i < n; i++) {
      PyObject* key = PyTuple_GET_ITEM(now.get(), i);
      if (!same_key(key, PyTuple_GET_ITEM(keys, i))) return false;
      PyObject* value = PyDict_GetItemWithError(dict, key);
      if (!value) return false;
      push(value);
    }
    return true;
  }

  bool is_items(PyObject* value, PyObject* n) {
    const Ref items(PySequence_Tuple(value));
    if (!items || PyTuple_GET_SIZE(items.get()) != PyLong_AsSsize_t(n)) return false;
    push_all(items.get());
    return true;
  }

  bool is_function(PyObject* f, PyObject* code, PyObject* names, PyObject* kinds) {
    if (PyFunction_GetCode(f) != code) return false;
    PyObject *defaults = PyFunction_GetDefaults(f), *keywords = PyFunction_GetKwDefaults(f);
    push(defaults ? defaults : Py_None);
    push(keywords ? keywords : Py_None);
    todo_.emplace_back(PyObject_GenericGetDict(f, nullptr));
    PyObject* closure = PyFunction_GetClosure(f);
    const Py_ssize_t cells = closure ? PyTuple_GET_SIZE(closure) : 0;
    for (Py_ssize_t i = 0; i < cells; i++) {
      PyObject* held = PyCell_GET(PyTuple_GET_ITEM(closure, i));
      if ((held == nullptr) != (PyTuple_GET_ITEM(kinds, i) == Py_False)) return false;
      if (held) push(held);
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++) {
      PyObject* value = PyDict_GetItemWithError(PyFunction_GetGlobals(f), PyTuple_GET_ITEM(names, i));
      PyObject* kind = PyTuple_GET_ITEM(kinds, cells + i);
      if (!value) {
        if (kind != Py_False) return false;
      } else if (kind == Py_None) {
        push(value);
      } else if (!type_is(value, kind)) {
        return false;
      }
    }
    return true;
  }

  const Names& names_;
  std::vector<Ref> todo_, containers_;
};

}  // namespace

bool fk::state_holds(PyObject* marks, PyObject* roots) {
  static const Names names;
  const bool holds = Walk(names).holds(marks, roots);
  if (PyErr_Occurred()) PyErr_Clear();  // which counts as a change
  return holds;
}
