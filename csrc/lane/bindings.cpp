// coded_torch._lane: what moves bytes between a pool and its processes. No torch header here:
// tensors are addresses.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "lane.h"
#include "rows.h"

namespace py = pybind11;
namespace lane = coded_torch::lane;
using Units = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

static std::shared_ptr<lane::Message> written(const lane::Form& form,
                                              const std::vector<lane::Piece>& pieces,
                                              lane::Blocks* blocks) {
  if (form.size <= lane::kShort && blocks != nullptr) {
    return std::make_shared<lane::Message>(form, pieces, blocks);
  }
  py::gil_scoped_release release;
  return std::make_shared<lane::Message>(form, pieces, blocks);
}

// The tensors are addresses and bytes.
static std::shared_ptr<lane::Message> message(
    const lane::Form& form, const std::vector<std::pair<uintptr_t, size_t>>& tensors,
    const std::shared_ptr<lane::Blocks>& blocks) {
  if (tensors.size() != form.places.size()) throw std::invalid_argument("a form of other tensors");
  std::vector<lane::Piece> pieces;
  pieces.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& [address, bytes] = tensors[i];
    pieces.push_back(lane::Piece{form.places[i], reinterpret_cast<const char*>(address), bytes});
  }
  return written(form, pieces, blocks.get());
}

static std::shared_ptr<lane::Message> message_of(const lane::Batch& batch, const lane::Form& form,
                                                 const Units& units,
                                                 const std::shared_ptr<lane::Blocks>& blocks) {
  std::vector<lane::Piece> pieces;
  batch.add(form, units.data(), size_t(units.size()), pieces);
  return written(form, pieces, blocks.get());
}

using Replies = std::vector<std::shared_ptr<lane::Received>>;

static py::tuple pickles_of(const Replies& replies) {
  py::tuple pickles(replies.size());
  for (size_t i = 0; i < replies.size(); ++i) {
    pickles[i] = py::bytes(replies[i]->view->data(), replies[i]->length);
  }
  return pickles;
}

// Copies the rows of replies to tensors: addresses, bytes, bytes of a row, and kinds of numbers.
// For each reply, `places` says where the rows of each tensor begin in its message, and `units`
// which rows it has. False if one is not finite, or a message is too short.
static bool join(const std::vector<std::tuple<uintptr_t, size_t, size_t, lane::Kind>>& tensors,
                 const Replies& replies, const std::vector<std::vector<size_t>>& places,
                 const std::vector<Units>& units) {
  if (places.size() != replies.size() || units.size() != replies.size()) {
    throw std::invalid_argument("replies of other parts");
  }
  std::vector<lane::Rows> joined;
  size_t bytes = 0;
  for (const auto& [address, size, row_bytes, kind] : tensors) {
    joined.push_back(lane::Rows{reinterpret_cast<char*>(address), size, row_bytes, kind});
    bytes += size;
  }
  std::optional<py::gil_scoped_release> release;
  if (bytes > lane::kShort) release.emplace();
  bool is_finite = true;
  for (size_t part = 0; part < places.size(); ++part) {
    const std::vector<size_t>& from = places[part];
    if (from.size() != joined.size()) throw std::invalid_argument("a part of other tensors");
    const lane::View& view = *replies[part]->view;
    const size_t count = size_t(units[part].size());
    for (size_t i = 0; i < joined.size(); ++i) {
      const size_t size = count * joined[i].row_bytes;
      if (from[i] > view.size() || size > view.size() - from[i]) return false;
      is_finite = joined[i].put(view.data() + from[i], units[part].data(), count) && is_finite;
    }
  }
  return is_finite;
}

// Has a call compute the units of parts, as messages of such forms. Returns whether all are finite.
static bool add_rows(lane::Lane& self, const std::shared_ptr<lane::Call>& call,
                     const lane::Batch& batch,
                     const std::vector<std::pair<const lane::Form*, Units>>& parts,
                     const std::shared_ptr<lane::Blocks>& blocks) {
  bool is_finite = true;
  for (const auto& [form, units] : parts) {
    auto message = message_of(batch, *form, units, blocks);
    is_finite = is_finite && message->is_finite();
    self.add_row(call, std::move(message));
    if (form->size <= lane::kShort) continue;
    py::gil_scoped_release release;
    self.look();  // it took time, and workers may be idle
  }
  return is_finite;
}

// The place, the key and the number of a row's worker, when it began and ended, the error number,
// the reply, and the message if it was not sent.
static py::tuple columns_of(const lane::Row& row) {
  return py::make_tuple(row.place, row.worker, row.number, row.began, row.ended, row.error,
                        row.reply ? py::cast(*row.reply) : py::none(), row.message);
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

  py::enum_<lane::Kind>(m, "Kind", "How numbers are stored.")
      .value("OTHER", lane::Kind::kOther)
      .value("HALF", lane::Kind::kHalf)
      .value("BFLOAT16", lane::Kind::kBfloat16)
      .value("SINGLE", lane::Kind::kSingle)
      .value("DOUBLE", lane::Kind::kDouble);
  py::class_<lane::Blocks, std::shared_ptr<lane::Blocks>>(
      m, "Blocks", "Blocks of shared memory that nobody reads.")
      .def(py::init<size_t>(), py::arg("most_bytes") = lane::kMostBytes)
      .def("__len__", &lane::Blocks::size);
  py::class_<lane::Form>(m, "Form", "Messages that differ only in the numbers of their tensors.")
      .def(py::init<std::string, size_t, std::vector<size_t>>(), py::arg("pickle"), py::arg("size"),
           py::arg("places"))
      .def_readonly("size", &lane::Form::size, "Bytes of a message.");
  py::class_<lane::Batch>(m, "Batch", "The units of a task, of which messages take some.")
      .def(py::init(
               [](const std::vector<std::tuple<uintptr_t, size_t, size_t, lane::Kind>>& tensors) {
                 lane::Batch batch;
                 for (const auto& [address, bytes, unit_bytes, kind] : tensors) {
                   batch.tensors.push_back(
                       {reinterpret_cast<const char*>(address), bytes, unit_bytes, kind});
                 }
                 return batch;
               }),
           py::arg("tensors"),
           "The tensors are addresses, bytes, and bytes of a unit, 0 for a whole tensor, and "
           "kinds.")
      .def("message", &message_of, py::arg("form"), py::arg("units"), py::arg("blocks"));
  py::class_<lane::Message, std::shared_ptr<lane::Message>>(
      m, "Message", "A pickle, and the numbers of its tensors, ready to be sent.")
      .def(py::init(&message), py::arg("form"), py::arg("tensors"), py::arg("blocks"),
           "The tensors are addresses and bytes. Without blocks, all receivers share its memory.")
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
  m.def("pickles", &pickles_of, py::arg("replies"));
  m.def("join", &join, py::arg("tensors"), py::arg("replies"), py::arg("places"), py::arg("units"));
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
      .def(py::init<>())
      .def_property_readonly("replies",
                             [](const lane::Call& self) {
                               py::list replies;
                               for (const lane::Row& row : self.rows) {
                                 replies.append(py::cast(*row.reply));
                               }
                               return replies;
                             })
      .def(
          "times",
          [](const lane::Call& self, double opened) {
            py::list times;
            for (const lane::Row& row : self.rows) {
              times.append(py::make_tuple(row.place, row.began - opened, row.ended - opened));
            }
            return times;
          },
          py::arg("opened"),
          "The place of each row's worker, and when it began and ended, in seconds since "
          "`opened`.");
  py::class_<lane::Lane, std::shared_ptr<lane::Lane>>(
      m, "Lane", "The connections to the workers of a pool. csrc/lane/lane.h says how it waits.")
      .def(py::init<int64_t, int64_t>(), py::arg("part"), py::arg("reply"))
      .def("add", &lane::Lane::add)
      .def("let_take", &lane::Lane::let_take)
      .def("add_rows", &add_rows, py::arg("call"), py::arg("batch"), py::arg("parts"),
           py::arg("blocks"))
      .def("freeze", &lane::Lane::freeze)
      .def(
          "rows",
          [](lane::Lane& self, const lane::Call& call) {
            py::list rows;
            for (const lane::Row& row : call.rows) rows.append(columns_of(row));
            return rows;
          },
          "The rows of a frozen call.")
      .def(
          "run",
          [](lane::Lane& self, lane::Call& call, int64_t target, double seconds,
             double late) -> std::optional<bool> {
            py::gil_scoped_release release;
            const bool in_time = self.wait(call, target, seconds, late, check_signals);
            if (self.is_done(call)) return true;
            if (!in_time || self.is_stopped(call, target)) return false;
            return std::nullopt;
          },
          py::arg("call"), py::arg("target"), py::arg("seconds"), py::arg("late"),
          "Wait as `wait`. True if all rows have replies, False if something is to be decided.")
      .def("watch", &lane::Lane::watch)
      .def("remove", &lane::Lane::remove)
      .def(
          "ask",
          [](lane::Lane& self,
             const std::vector<std::tuple<int64_t, int64_t, std::shared_ptr<lane::Message>,
                                          std::shared_ptr<lane::Call>>>& parts) {
            std::vector<lane::Lane::Asked> asked;
            for (const auto& [worker, number, message, call] : parts) {
              asked.push_back({worker, number, message, call});
            }
            return self.ask(asked);
          },
          py::arg("parts"), "Takes microseconds, so that the lock stays.")
      .def("look_at", &lane::Lane::look_at)
      .def(
          "wait",
          [](lane::Lane& self, lane::Call& call, int64_t target, double seconds, double late) {
            py::gil_scoped_release release;
            return self.wait(call, target, seconds, late, check_signals);
          },
          py::arg("call"), py::arg("target"), py::arg("seconds"), py::arg("late"))
      .def("look", &lane::Lane::look, py::call_guard<py::gil_scoped_release>())
      .def("stand_by", &lane::Lane::stand_by, py::call_guard<py::gil_scoped_release>())
      .def("ring", &lane::Lane::ring)
      .def("notify", &lane::Lane::notify)
      .def("want_replies", &lane::Lane::want_replies)
      .def("front", &front)
      .def(
          "pop", [](lane::Lane& self) { self.pop(); }, "Remove the news that `front` returns.")
      .def("settled", &lane::Lane::settled)
      .def("has_part", &lane::Lane::has_part)
      .def_property_readonly("leader", &lane::Lane::leader)
      .def("close", &lane::Lane::close);
}
