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
// cycle that Python's garbage collector cannot see; what it looks at from outside, and the values
// it compares with, are kept alive by whoever made it.
class Watch {
 public:
  // (kind, object, key, value):
  //   "item"       a dict has `value` at `key` (None where there is nothing), a list at that index
  //   "attribute"  an object's attribute `key` is `value`
  //   "size"       a dict or list has `value` items
  //   "type"       an object is of the class `value`
  //   "tensor"     a tensor's `_cdata`, where torch keeps it, is `value`
  explicit Watch(const pybind11::list& facts) {
    for (const auto& given : facts) {
      const auto entry = pybind11::cast<pybind11::tuple>(given);
      facts_.push_back(fact(pybind11::cast<std::string>(entry[0]), entry[1], entry[2], entry[3]));
    }
  }

  // All facts of others, which must be kept alive, one after the other.
  explicit Watch(const std::vector<const Watch*>& watches) {
    for (const Watch* watch : watches) {
      facts_.insert(facts_.end(), watch->facts_.begin(), watch->facts_.end());
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
    Py_ssize_t number;            // a key's hash, an index, a size or an address
    const PyGetSetDef* computed;  // how an attribute is got that its class computes in C
    const Py_ssize_t* word;       // where an object itself has an address, if that was found
  };

  static Fact fact(const std::string& kind, const pybind11::handle& object,
                   const pybind11::handle& key, const pybind11::handle& value) {
    PyObject *const o = object.ptr(), *const k = key.ptr(), *const v = value.ptr();
    Fact fact{Kind::type, o, k, v, 0, nullptr, nullptr};
    if (kind == "item" && PyDict_Check(o)) {
      fact.kind = Kind::in_dict;
      fact.number = PyObject_Hash(k);  // a tensor's takes Python to work out
      if (fact.number == -1) throw pybind11::error_already_set();
    } else if (kind == "item" && PyList_Check(o)) {
      fact.kind = Kind::in_list;
      fact.number = pybind11::cast<Py_ssize_t>(key);
    } else if (kind == "attribute" && is_own_of_class(o, k, v)) {
      fact.kind = Kind::in_dict;
      fact.object = reinterpret_cast<PyTypeObject*>(o)->tp_dict;
      fact.number = PyObject_Hash(k);
    } else if (kind == "attribute") {
      fact.kind = Kind::attribute;
      fact.computed = computed_by_class(o, k);
    } else if (kind == "size") {
      fact.kind = Kind::size;
      fact.number = pybind11::cast<Py_ssize_t>(value);
    } else if (kind == "tensor") {
      fact.kind = Kind::tensor;
      fact.number = pybind11::cast<Py_ssize_t>(value);
      fact.computed = computed_by_class(o, pybind11::str("_cdata").ptr());
      fact.word = word_of(o, fact.number);
    } else if (kind != "type") {
      throw std::invalid_argument(
          "Watch: a fact must be an item of a dict or list, an attribute, "
          "a size, a type or a tensor, got " +
          kind);
    }
    return fact;
  }

  // Whether an object is a class that itself has a function of that name: its dictionary is quicker
  // to ask.
  static bool is_own_of_class(PyObject* object, PyObject* name, PyObject* value) {
    if (!PyType_Check(object) || !PyFunction_Check(value)) return false;
    PyObject* const own = reinterpret_cast<PyTypeObject*>(object)->tp_dict;
    return own != nullptr && PyDict_GetItem(own, name) == value;
  }

  // A tensor's Python object has the address of its implementation in one of its first words; which
  // one is torch's business, so it is looked for. To read it there takes a tenth of the time.
  static const Py_ssize_t* word_of(PyObject* tensor, Py_ssize_t address) {
    const auto* word = reinterpret_cast<const Py_ssize_t*>(tensor + 1);
    const auto* end = reinterpret_cast<const Py_ssize_t*>(reinterpret_cast<const char*>(tensor) +
                                                          Py_TYPE(tensor)->tp_basicsize);
    while (word < end && *word != address) ++word;
    return word < end ? word : nullptr;
  }

  // Half of the time that getting an attribute takes is to find out how.
  static const PyGetSetDef* computed_by_class(PyObject* object, PyObject* name) {
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    const auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(type, name));
    if (!found) {
      PyErr_Clear();
      return nullptr;
    }
    if (!Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type)) return nullptr;
    return reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;
  }

  bool holds(const Fact& fact) const {
    switch (fact.kind) {
      case Kind::in_dict: {
        PyObject* now = _PyDict_GetItem_KnownHash(fact.object, fact.key, fact.number);
        if (now == nullptr) {
          PyErr_Clear();
          now = Py_None;
        }
        return now == fact.value;
      }
      case Kind::in_list:
        return fact.number < PyList_GET_SIZE(fact.object) &&
               PyList_GET_ITEM(fact.object, fact.number) == fact.value;
      case Kind::attribute:
        return attribute(fact).ptr() == fact.value;
      case Kind::size:
        return fact.number == (PyDict_Check(fact.object) ? PyDict_GET_SIZE(fact.object)
                                                         : PyList_GET_SIZE(fact.object));
      case Kind::type:
        return reinterpret_cast<PyObject*>(Py_TYPE(fact.object)) == fact.value;
      case Kind::tensor:
        if (fact.word != nullptr) return *fact.word == fact.number;
        return PyLong_AsSsize_t(attribute(fact).ptr()) == fact.number;
    }
    return false;
  }

  static pybind11::object attribute(const Fact& fact) {
    const PyGetSetDef* computed = fact.computed;
    PyObject* now = computed == nullptr ? PyObject_GetAttr(fact.object, fact.key)
                                        : computed->get(fact.object, computed->closure);
    if (now == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(now);
  }

  std::vector<Fact> facts_;
};

}  // namespace fastdni
