// What Python asks of objects at every call, faster. Needs the GIL.
#pragma once
#include <Python.h>

namespace fk {
// The place of the first entry, a tuple of a tuple, that does not hold any more; -1 if all do.
// flowkernels/runtime/watch.py has what the entries are.
Py_ssize_t watch_changed(PyObject* entries);

// What marks are: a number that changes with it, here and in flowkernels/sampling/state.py, so that no build reads
// others'.
constexpr int kStateForm = 2;

// Whether the marks, a tuple of tuples, hold of the objects from `roots` on, a tuple: flowkernels/sampling/state.py.
bool state_holds(PyObject* marks, PyObject* roots);
}  // namespace fk
