// The numbers of torch.optim's parameter groups, as a step is handed them. Read at every step, from
// dictionaries that anybody may have changed since the last one.
#pragma once
#include <pybind11/pybind11.h>

#include <cmath>
#include <string>
#include <vector>

#include "common/optimizer.h"

namespace fastdni {

class OptimizerNumbers {
 public:
  // groups: (name of the optimizer's class, "SGD", "Adam" or "AdamW"; its group).
  explicit OptimizerNumbers(const pybind11::list& groups) {
    for (const auto& given : groups) {
      const auto entry = pybind11::cast<pybind11::tuple>(given);
      groups_.push_back({pybind11::cast<std::string>(entry[0]) == "SGD", entry[1].ptr(), {}});
      groups_.back().kind = kind_of(groups_.back());
    }
  }

  // The numbers as they are now, a row a group: rule, lr, weight_decay, a, b, eps, nesterov
  // (common/optimizer.h). NaN for a learning rate that is in a GPU's memory: to look at it would be
  // to wait. The dictionaries are kept by whoever made this.
  pybind11::list rows() const {
    pybind11::list rows(kOptimizerNumbers * groups_.size());
    size_t at = 0;
    for (const Group& group : groups_) {
      const auto put = [&](double number) {
        PyList_SET_ITEM(rows.ptr(), at++, PyFloat_FromDouble(number));
      };
      const auto number = [&](PyObject* key) { return to_double(item(group.dict, key).ptr()); };
      put(static_cast<double>(rule_of(group)));
      const pybind11::object rate = item(group.dict, keys().lr);
      put(is_on_device(rate.ptr()) ? std::nan("") : to_rate(rate.ptr()));
      put(number(keys().weight_decay));
      if (group.sgd) {
        put(number(keys().momentum));
        put(number(keys().dampening));
        put(0);
        put(number(keys().nesterov));
        continue;
      }
      const auto betas = pybind11::reinterpret_steal<pybind11::object>(
          PySequence_Fast(item(group.dict, keys().betas).ptr(), "betas must be two numbers"));
      if (!betas) throw pybind11::error_already_set();
      if (PySequence_Fast_GET_SIZE(betas.ptr()) != 2) {
        throw pybind11::value_error("betas must be two numbers");
      }
      put(to_double(PySequence_Fast_GET_ITEM(betas.ptr(), 0)));
      put(to_double(PySequence_Fast_GET_ITEM(betas.ptr(), 1)));
      put(number(keys().eps));
      put(0);
    }
    return rows;
  }

  // The same, or None where a group asks for another rule than when this was made, or has a
  // learning rate of another kind.
  pybind11::object rows_if_alike() const {
    for (const Group& group : groups_) {
      if (!(kind_of(group) == group.kind)) return pybind11::none();
    }
    return rows();
  }

 private:
  struct Kind {
    Rule rule = Rule::none;
    PyTypeObject* rate = nullptr;
    bool on_device = false;
    bool operator==(const Kind&) const = default;
  };
  struct Group {
    bool sgd;
    PyObject* dict;
    Kind kind;
  };
  struct Keys {
    PyObject *lr, *weight_decay, *momentum, *dampening, *nesterov, *betas, *eps, *decoupled,
        *device;
  };

  static const Keys& keys() {
    const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
    static const Keys made{
        name("lr"),       name("weight_decay"), name("momentum"), name("dampening"),
        name("nesterov"), name("betas"),        name("eps"),      name("decoupled_weight_decay"),
        name("is_cpu")};
    return made;
  }

  static pybind11::object item(PyObject* dict, PyObject* key) {
    if (PyDict_CheckExact(dict)) {
      PyObject* const found = PyDict_GetItemWithError(dict, key);
      if (found != nullptr) return pybind11::reinterpret_borrow<pybind11::object>(found);
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
      throw pybind11::error_already_set();
    }
    auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetItem(dict, key));
    if (!found) throw pybind11::error_already_set();
    return found;
  }

  static double to_double(PyObject* number) {
    const double value = PyFloat_AsDouble(number);
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }

  static double to_rate(PyObject* rate) {
    const double value = to_double(rate);
    if (!std::isfinite(value)) throw pybind11::value_error("a learning rate must be finite");
    return value;
  }

  // Whether a number is a tensor that is not on the CPU.
  static bool is_on_device(PyObject* number) {
    if (PyFloat_CheckExact(number) || PyLong_CheckExact(number)) return false;
    const auto on_cpu =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(number, keys().device));
    if (!on_cpu) PyErr_Clear();
    return on_cpu.ptr() == Py_False;
  }

  static Rule rule_of(const Group& group) {
    if (group.sgd) {
      const bool plain = to_double(item(group.dict, keys().momentum).ptr()) == 0;
      return plain ? Rule::sgd : Rule::sgd_momentum;
    }
    const int decoupled = PyObject_IsTrue(item(group.dict, keys().decoupled).ptr());
    if (decoupled < 0) throw pybind11::error_already_set();
    return decoupled == 1 ? Rule::adamw : Rule::adam;
  }

  static Kind kind_of(const Group& group) {
    const pybind11::object rate = item(group.dict, keys().lr);
    return {rule_of(group), Py_TYPE(rate.ptr()), is_on_device(rate.ptr())};
  }

  std::vector<Group> groups_;
};

}  // namespace fastdni
