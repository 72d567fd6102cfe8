// Notices that dictionaries and lists no longer hold what they held.
//
// A training step asks at every call whether modules, hooks and optimizers are as they were;
// hundreds of comparisons of pointers, which take Python tens of microseconds and this one.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace fastdni {

// The objects must be kept alive by whoever made the watch: it holds no references, so that it is
// no part of a cycle that Python's garbage collector cannot see.
class Watch {
 public:
  // items: (container, key, value): a dict has `value` at `key` (None where there is none), a list
  // at that index. sizes: (container, number of its items).
  Watch(const pybind11::list& items, const pybind11::list& sizes) {
    for (const auto& item : items) {
      const auto entry = pybind11::cast<pybind11::tuple>(item);
      PyObject* container = entry[0].ptr();
      if (PyDict_Check(container)) {
        in_dicts_.push_back({container, entry[1].ptr(), entry[2].ptr()});
      } else if (PyList_Check(container)) {
        in_lists_.push_back({container, pybind11::cast<Py_ssize_t>(entry[1]), entry[2].ptr()});
      } else {
        attributes_.push_back({container, entry[1].ptr(), entry[2].ptr()});
      }
    }
    for (const auto& size : sizes) {
      const auto entry = pybind11::cast<pybind11::tuple>(size);
      sizes_.push_back({entry[0].ptr(), pybind11::cast<Py_ssize_t>(entry[1])});
    }
  }

  bool unchanged() const {
    for (const Size& size : sizes_) {
      const Py_ssize_t now = PyDict_Check(size.container) ? PyDict_GET_SIZE(size.container)
                                                          : PyList_GET_SIZE(size.container);
      if (now != size.count) return false;
    }
    for (const InDict& item : in_dicts_) {
      PyObject* now = PyDict_GetItemWithError(item.dict, item.key);
      if (now == nullptr) {
        PyErr_Clear();
        now = Py_None;
      }
      if (now != item.value) return false;
    }
    for (const InList& item : in_lists_) {
      if (item.index >= PyList_GET_SIZE(item.list)) return false;
      if (PyList_GET_ITEM(item.list, item.index) != item.value) return false;
    }
    for (const Attribute& attribute : attributes_) {
      PyObject* now = PyObject_GetAttr(attribute.object, attribute.name);
      if (now == nullptr) throw pybind11::error_already_set();
      const bool same = now == attribute.value;
      Py_DECREF(now);
      if (!same) return false;
    }
    return true;
  }

 private:
  struct InDict {
    PyObject *dict, *key, *value;
  };
  struct InList {
    PyObject* list;
    Py_ssize_t index;
    PyObject* value;
  };
  struct Attribute {
    PyObject *object, *name, *value;
  };
  struct Size {
    PyObject* container;
    Py_ssize_t count;
  };
  std::vector<InDict> in_dicts_;
  std::vector<InList> in_lists_;
  std::vector<Attribute> attributes_;
  std::vector<Size> sizes_;
};

}  // namespace fastdni
