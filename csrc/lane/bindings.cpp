// coded_torch._lane: what moves bytes between a pool and its processes. No torch header here:
// tensors are addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "lane.h"

namespace py = pybind11;
namespace lane = coded_torch::lane;
// The place in the message, the address and the bytes of numbers.
using Pieces = std::vector<std::tuple<size_t, uintptr_t, size_t>>;

static std::shared_ptr<lane::Message> message(const std::string& pickle, size_t size,
                                              const Pieces& pieces,
                                              const std::shared_ptr<lane::Blocks>& blocks) {
  std::vector<lane::Piece> found;
  found.reserve(pieces.size());
  for (const auto& [offset, address, bytes] : pieces) {
    found.push_back(lane::Piece{offset, reinterpret_cast<const char*>(address), bytes});
  }
  if (size <= lane::kShort && blocks != nullptr) {
    return std::make_shared<lane::Message>(pickle, size, found, blocks.get());
  }
  py::gil_scoped_release release;
  return std::make_shared<lane::Message>(pickle, size, found, blocks.get());
}

static std::shared_ptr<lane::Received> receive(lane::Connection& connection) {
  while (true) {
    try {
      py::gil_scoped_release release;
      auto received = connection.receive();
      return received ? std::make_shared<lane::Received>(std::move(*received)) : nullptr;
    } catch (const std::system_error& error) {
      if (error.code().value() != EINTR) throw;
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

static void check_signals() {
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

static py::object front(lane::Lane& self) {
  const lane::News* news = self.front();
  if (news == nullptr) return py::none();
  return py::make_tuple(news->worker, int(news->kind),
                        news->message ? py::cast(*news->message) : py::none(), news->error,
                        self.is_gone(news->worker));
}

PYBIND11_MODULE(_lane, m) {
  m.doc() = "Messages between a pool and its processes.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const lane::Broken& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::system_error& error) {
      errno = error.code().value();
      PyErr_SetFromErrno(PyExc_OSError);
    }
  });
  m.def(
      "note_fork", [] { ++lane::forks; },
      "Note that this process is to fork: its child may read what is read now.");

  py::class_<lane::Blocks, std::shared_ptr<lane::Blocks>>(
      m, "Blocks", "Blocks of shared memory that nobody reads.")
      .def(py::init<size_t>(), py::arg("most_bytes") = lane::kMostBytes)
      .def("__len__", &lane::Blocks::size);
  py::class_<lane::Message, std::shared_ptr<lane::Message>>(
      m, "Message", "A pickle, and the numbers of its tensors, ready to be sent.")
      .def(py::init(&message), py::arg("pickle"), py::arg("size"), py::arg("pieces"),
           py::arg("blocks"), "Without blocks, all receivers share its memory.")
      .def_property_readonly("is_long",
                             [](const lane::Message& self) { return self.block() != nullptr; })
      .def_property_readonly(
          "number",
          [](const lane::Message& self) { return self.block() ? self.block()->number() : -1; },
          "The number of its block, or -1.")
      .def_property_readonly("descriptor", [](const lane::Message& self) {
        return self.block() ? self.block()->descriptor() : -1;
      });
  py::class_<lane::View, std::shared_ptr<lane::View>>(
      m, "View", py::buffer_protocol(), "The memory of a message, which is kept as long as this.")
      .def_buffer([](lane::View& self) {
        return py::buffer_info(self.data(), 1, py::format_descriptor<uint8_t>::format(),
                               py::ssize_t(self.size()));
      });
  py::class_<lane::Received, std::shared_ptr<lane::Received>>(m, "Received",
                                                              "A message that has come.")
      .def_readonly("kind", &lane::Received::kind)
      .def_readonly("number", &lane::Received::number)
      .def_readonly("length", &lane::Received::length, "Bytes of the pickle.")
      .def_readonly("memory", &lane::Received::view)
      .def_property_readonly(
          "pickle",
          [](const lane::Received& self) { return py::bytes(self.view->data(), self.length); })
      .def_property_readonly("is_long",
                             [](const lane::Received& self) { return self.view->is_long(); });
  py::class_<lane::Connection, std::shared_ptr<lane::Connection>>(
      m, "Connection", "One end of a connection, a Unix socket of packets, which it closes.")
      .def(py::init<int, std::shared_ptr<lane::Blocks>>(), py::arg("descriptor"), py::arg("blocks"))
      .def("fileno", &lane::Connection::descriptor)
      .def("send", &lane::Connection::send, py::arg("kind"), py::arg("number"),
           py::arg("message") = nullptr, py::call_guard<py::gil_scoped_release>())
      .def("tell", &lane::Connection::tell, py::arg("kind"), py::arg("number") = 0,
           "Send two numbers, from any thread, unless the other side has left many unread.")
      .def("receive", &receive, "The next message; None at the end.")
      .def("close", &lane::Connection::close);
  py::class_<lane::Call, std::shared_ptr<lane::Call>>(m, "Call", "The replies of one request.")
      .def(py::init<>());
  py::class_<lane::Lane, std::shared_ptr<lane::Lane>>(
      m, "Lane", "The connections to the workers of a pool. csrc/lane/lane.h says how it waits.")
      .def(py::init<int64_t>(), py::arg("reply"))
      .def("add", &lane::Lane::add)
      .def("watch", &lane::Lane::watch)
      .def("remove", &lane::Lane::remove)
      .def("ask", &lane::Lane::ask, "Takes microseconds, so that the lock stays.")
      .def(
          "wait",
          [](lane::Lane& self, lane::Call& call, int64_t target, double seconds) {
            py::gil_scoped_release release;
            self.wait(call, target, seconds, check_signals);
          },
          py::arg("call"), py::arg("target"), py::arg("seconds"))
      .def("look", &lane::Lane::look, py::call_guard<py::gil_scoped_release>())
      .def("stand_by", &lane::Lane::stand_by, py::call_guard<py::gil_scoped_release>())
      .def("ring", &lane::Lane::ring)
      .def("notify", &lane::Lane::notify)
      .def("want_replies", &lane::Lane::want_replies)
      .def("front", &front)
      .def(
          "pop", [](lane::Lane& self) { self.pop(); }, "Remove the news that `front` returns.")
      .def("settled", &lane::Lane::settled)
      .def_property_readonly("leader", &lane::Lane::leader)
      .def("close", &lane::Lane::close);
}
