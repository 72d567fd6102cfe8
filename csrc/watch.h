// Notices that dictionaries, lists and objects no longer hold what they held.
//
// A training step asks at every call whether modules, hooks and optimizers are as they were;
// hundreds of comparisons of pointers, which take Python tens of microseconds and this one.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

namespace fastdni {

// Facts, in an order in which each is only looked at when those before it hold: a container that
// hangs below another is alive then. The watch holds no references, so that it is no part of a
// cycle that Python's garbage collector cannot see; what it looks at from outside, and the values it
// compares with, are kept alive by whoever made it.
class Watch {
 public:
  // (kind, object, key, value):
  //   "item"       a dict has `value` at `key` (None where there is nothing), a list at that index
  //   "attribute"  an object's attribute `key` is `value`
  //   "size"       a dict or list has `value` items
  //   "type"       an object is of the class `value`
  //   "tensor"     a tensor's `_cdata`, where torch keeps it, is `value`
  explicit Watch(const pybind11::list& facts) : address_(pybind11::str("_cdata")) {
    for (const auto& given : facts) {
      const auto entry = pybind11::cast<pybind11::tuple>(given);
      facts_.push_back(fact(pybind11::cast<std::string>(entry[0]), entry[1], entry[2], entry[3]));
    }
  }

  bool unchanged() const {
    for (const Fact& fact : facts_) {
      if (!holds(fact)) return false;
    }
    return true;
  }

 private:
  enum class Kind { in_dict, in_list, attribute, size, type, tensor };
  struct Fact {
    Kind kind;
    PyObject *object, *key, *value;
    Py_ssize_t number;  // an index, a size or an address
  };

  static Fact fact(const std::string& kind, const pybind11::handle& object,
                   const pybind11::handle& key, const pybind11::handle& value) {
    const auto number = [](const pybind11::handle& n) { return pybind11::cast<Py_ssize_t>(n); };
    PyObject *const o = object.ptr(), *const k = key.ptr(), *const v = value.ptr();
    if (kind == "item" && PyDict_Check(o)) return {Kind::in_dict, o, k, v, 0};
    if (kind == "item" && PyList_Check(o)) return {Kind::in_list, o, nullptr, v, number(key)};
    if (kind == "attribute") return {Kind::attribute, o, k, v, 0};
    if (kind == "size") return {Kind::size, o, nullptr, nullptr, number(value)};
    if (kind == "type") return {Kind::type, o, nullptr, v, 0};
    if (kind == "tensor") return {Kind::tensor, o, nullptr, nullptr, number(value)};
    throw std::invalid_argument("Watch: a fact must be an item of a dict or list, an attribute, a "
                                "size, a type or a tensor, got " + kind);
  }

  bool holds(const Fact& fact) const {
    switch (fact.kind) {
      case Kind::in_dict: {
        PyObject* now = PyDict_GetItemWithError(fact.object, fact.key);
        if (now == nullptr) {
          PyErr_Clear();
          now = Py_None;
        }
        return now == fact.value;
      }
      case Kind::in_list:
        return fact.number < PyList_GET_SIZE(fact.object) &&
               PyList_GET_ITEM(fact.object, fact.number) == fact.value;
      case Kind::attribute: {
        const auto now = attribute(fact.object, fact.key);
        return now.ptr() == fact.value;
      }
      case Kind::size:
        return fact.number == (PyDict_Check(fact.object) ? PyDict_GET_SIZE(fact.object)
                                                         : PyList_GET_SIZE(fact.object));
      case Kind::type:
        return reinterpret_cast<PyObject*>(Py_TYPE(fact.object)) == fact.value;
      case Kind::tensor: {
        const auto now = attribute(fact.object, address_.ptr());
        return PyLong_AsSsize_t(now.ptr()) == fact.number;
      }
    }
    return false;
  }

  static pybind11::object attribute(PyObject* object, PyObject* name) {
    auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(object, name));
    if (!found) throw pybind11::error_already_set();
    return found;
  }

  std::vector<Fact> facts_;
  pybind11::object address_;
};

}  // namespace fastdni
