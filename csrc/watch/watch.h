// flowkernels/fusion/watch.py has what the entries are. Needs the GIL.
#pragma once
#include <Python.h>

namespace fk {
// The place of the first entry, a tuple of a tuple, that does not hold any more; -1 if all do.
Py_ssize_t watch_changed(PyObject* entries);
}  // namespace fk
