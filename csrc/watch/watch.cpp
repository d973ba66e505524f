// Whether anything that a network's Python reads is not what it was: flowkernels/runtime/watch.py, whose `_changed`
// this is, entry for entry. A few nanoseconds for an attribute, some hundred for a tensor.
#include "watch/watch.h"

#include "tensors.h"

namespace {

struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* version = PyUnicode_InternFromString("_version");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
};

bool is_same(PyObject* now, PyObject* then) {
  return now == then;
}

// A new reference is compared and let go; an error counts as a change.
bool is_equal(PyObject* now, PyObject* then) {
  if (!now) {
    PyErr_Clear();
    return false;
  }
  const int equal = now == then ? 1 : PyObject_RichCompareBool(now, then, Py_EQ);
  Py_DECREF(now);
  if (equal < 0) PyErr_Clear();
  return equal > 0;
}

bool dict_is(PyObject* dict, PyObject* keys, PyObject* values) {
  const Py_ssize_t n = PyTuple_GET_SIZE(keys);
  if (!dict || PyDict_GET_SIZE(dict) != n) return false;
  PyObject *key, *value;
  Py_ssize_t at = 0, i = 0;
  for (; i < n && PyDict_Next(dict, &at, &key, &value); i++) {
    if (key != PyTuple_GET_ITEM(keys, i) || value != PyTuple_GET_ITEM(values, i)) return false;
  }
  return i == n;
}

bool attributes_are(PyObject* object, PyObject* keys, PyObject* values) {
  PyObject* dict = PyObject_GenericGetDict(object, nullptr);
  if (!dict) PyErr_Clear();
  const bool same = dict_is(dict, keys, values);
  Py_XDECREF(dict);
  return same;
}

bool list_is(PyObject* list, PyObject* items) {
  const Py_ssize_t n = PyTuple_GET_SIZE(items);
  if (PyList_GET_SIZE(list) != n) return false;
  for (Py_ssize_t i = 0; i < n; i++) {
    if (PyList_GET_ITEM(list, i) != PyTuple_GET_ITEM(items, i)) return false;
  }
  return true;
}

bool function_is(PyObject* f, PyObject* parts) {
  PyObject *defaults = PyFunction_GetDefaults(f), *keywords = PyFunction_GetKwDefaults(f);
  return is_same(PyFunction_GetCode(f), PyTuple_GET_ITEM(parts, 0)) &&
         is_same(defaults ? defaults : Py_None, PyTuple_GET_ITEM(parts, 1)) &&
         is_same(keywords ? keywords : Py_None, PyTuple_GET_ITEM(parts, 2));
}

PyObject* class_dict(PyObject* type) {  // borrowed: the class keeps it
#if PY_VERSION_HEX >= 0x030C0000
  PyObject* dict = PyType_GetDict(reinterpret_cast<PyTypeObject*>(type));
  Py_XDECREF(dict);
  return dict;
#else
  return reinterpret_cast<PyTypeObject*>(type)->tp_dict;
#endif
}

bool tensor_is(const Names& names, PyObject* t, PyObject* then) {
  PyObject *address = PyTuple_GET_ITEM(then, 0), *version = PyTuple_GET_ITEM(then, 1);
  PyObject *shape = PyTuple_GET_ITEM(then, 2), *strides = PyTuple_GET_ITEM(then, 3);
  if (version != Py_None && !is_equal(PyObject_GetAttr(t, names.version), version)) return false;
  if (!is_equal(PyObject_GetAttr(t, names.dtype), PyTuple_GET_ITEM(then, 4))) return false;
  if (const int known = lies_at(t, address, shape, strides); known >= 0) return known;
  return is_equal(PyObject_CallMethodNoArgs(t, names.data_ptr), address) &&
         is_equal(PyObject_GetAttr(t, names.shape), shape) &&
         is_equal(PyObject_CallMethodNoArgs(t, names.stride), strides);
}

bool holds(const Names& names, PyObject* entry) {
  PyObject *object = PyTuple_GET_ITEM(entry, 1), *a = PyTuple_GET_ITEM(entry, 2), *b = PyTuple_GET_ITEM(entry, 3);
  switch (PyLong_AsLong(PyTuple_GET_ITEM(entry, 0))) {
    case 0: return dict_is(object, a, b);
    case 1: return list_is(object, a);
    case 2:
      return is_same(reinterpret_cast<PyObject*>(Py_TYPE(object)), a) &&
             attributes_are(object, PyTuple_GET_ITEM(b, 0), PyTuple_GET_ITEM(b, 1));
    case 3: {
      PyObject* now = PyCell_GET(object);
      return is_same(now ? now : b, a);  // b stands for nothing
    }
    case 4: return function_is(object, a);
    case 5: {
      PyObject* now = PyDict_GetItemWithError(object, a);
      if (!now && PyErr_Occurred()) PyErr_Clear();
      return is_same(now ? now : object, b);  // the dict itself stands for nothing
    }
    case 6: return tensor_is(names, object, a);
    case 7: return dict_is(class_dict(object), a, b);
    default: return is_equal(PyObject_CallNoArgs(object), a);
  }
}

}  // namespace

Py_ssize_t fk::watch_changed(PyObject* entries) {
  static const Names names;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(entries); i++) {
    if (!holds(names, PyTuple_GET_ITEM(entries, i))) return i;
  }
  return -1;
}
