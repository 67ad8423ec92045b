// A short open path through n points, of which only the distances are known.
//
// Greedy nearest neighbours from the most remote point, then local search: 2-opt (Croes, 1958) and
// Or-opt (Or, 1976) over neighbour lists with don't-look bits (Bentley, 1992). The same distances
// give the same path on every machine: no clock, no random number, ties to the lower index.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

namespace coded_torch {

constexpr int64_t kPathNeighbours = 10;
constexpr int64_t kPathStrips = 32;  // a multiple of the widest vector register's lanes
constexpr int64_t kPathSegment = 3;  // the longest segment that Or-opt moves
// Around one move a point is usual. The bound is there for distances that are not symmetric, where
// a reversal changes more than its ends and moves could go round in circles.
constexpr int64_t kPathMovesPerPoint = 20;

// T is float or double. NaN counts as infinitely far; a point with no finite distance to another is
// not `placed`, and ends the path.
template <typename T>
class ShortPath {
 public:
  // distances [n, n], row-major, symmetric; the diagonal is not read. order [n] receives the path.
  ShortPath(const T* distances, int64_t n, int64_t* order)
      : distances_(distances), n_(n), path_(order), position_(n), neighbours_(n), near_(n) {
    row_.assign((n + kPathStrips - 1) / kPathStrips * kPathStrips, kInfinity);
    for (int64_t a = 0; a < n_; ++a) find_neighbours(a);
    start_greedily();
    improve();
  }

 private:
  struct Neighbours {
    std::array<int64_t, kPathNeighbours> points;  // by distance, then by index
    int64_t size = 0;
    const int64_t* begin() const { return points.data(); }
    const int64_t* end() const { return points.data() + size; }
  };
  static constexpr int64_t kNone = -1;  // the neighbour of an end of the path
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  const T* row(int64_t a) const { return distances_ + a * n_; }

  T distance(int64_t a, int64_t b) const {
    if (a == kNone || b == kNone) return 0;  // a path may end anywhere at no cost
    const T d = row(a)[b];
    return d < kInfinity ? d : kInfinity;
  }

  int64_t at(int64_t i) const { return 0 <= i && i < placed_ ? path_[i] : kNone; }

  // Not for rounding: a gain of no more than that may be a loss seen from the other side.
  static bool worthwhile(T gain, T removed) { return gain > removed * static_cast<T>(1e-6); }

  void find_neighbours(int64_t a) {
    std::copy(row(a), row(a) + n_, row_.begin());
    row_[a] = kInfinity;
    // As many as are wanted lie within a bound that few exceed: the nearest points of the strips of
    // every 32nd one, found without branches, and of these the tenth.
    std::array<T, kPathStrips> bounds;
    bounds.fill(kInfinity);
    for (size_t b = 0; b < row_.size(); b += kPathStrips) {
      for (int64_t i = 0; i < kPathStrips; ++i) {
        bounds[i] = row_[b + i] < bounds[i] ? row_[b + i] : bounds[i];
      }
    }
    const T bound = tenth_of(bounds);
    int64_t count = 0;
    for (int64_t b = 0; b < n_; ++b) {
      near_[count] = b;
      count += row_[b] <= bound;
    }
    std::array<T, kPathNeighbours> nearest;
    Neighbours found;
    T farthest = kInfinity;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t b = near_[k];
      const T d = row_[b];
      if (!(d < farthest)) continue;
      int64_t i = found.size < kPathNeighbours ? found.size++ : kPathNeighbours - 1;
      for (; i > 0 && d < nearest[i - 1]; --i) {
        nearest[i] = nearest[i - 1];
        found.points[i] = found.points[i - 1];
      }
      nearest[i] = d;
      found.points[i] = b;
      if (found.size == kPathNeighbours) farthest = nearest[kPathNeighbours - 1];
    }
    neighbours_[a] = found;
  }

  // The tenth smallest number: the smallest that ten are not larger than. Compilers count those a
  // vector at a time, in half the time of a selection, whose branches are not foreseen.
  static T tenth_of(const std::array<T, kPathStrips>& numbers) {
    std::array<int32_t, kPathStrips> counts{};
    for (const T number : numbers) {
      for (int64_t i = 0; i < kPathStrips; ++i) counts[i] += number <= numbers[i];
    }
    T least = kInfinity;
    for (int64_t i = 0; i < kPathStrips; ++i) {
      least = counts[i] >= kPathNeighbours && numbers[i] < least ? numbers[i] : least;
    }
    return least;
  }

  // Columns are summed, not rows, because independent sums go into vector registers.
  int64_t most_remote() const {
    std::vector<double> sums(n_, 0.0);
    for (int64_t a = 0; a < n_; ++a) {
      const T* d = row(a);
      for (int64_t b = 0; b < a; ++b) sums[b] += d[b] < kInfinity ? d[b] : T(0);
      for (int64_t b = a + 1; b < n_; ++b) sums[b] += d[b] < kInfinity ? d[b] : T(0);
    }
    int64_t best = kNone;
    for (int64_t a = 0; a < n_; ++a) {
      if (neighbours_[a].size && (best == kNone || sums[a] > sums[best])) best = a;
    }
    return best;
  }

  void start_greedily() {
    std::vector<char> free(n_, 0);
    for (int64_t a = 0; a < n_; ++a) free[a] = neighbours_[a].size > 0;
    const int64_t count = std::count(free.begin(), free.end(), 1);
    for (int64_t a = most_remote(); placed_ < count; a = nearest_free(a, free)) {
      position_[a] = placed_;
      path_[placed_++] = a;
      free[a] = 0;
    }
    int64_t* last = path_ + placed_;
    for (int64_t a = 0; a < n_; ++a) {
      if (!neighbours_[a].size) *last++ = a;
    }
  }

  int64_t nearest_free(int64_t a, const std::vector<char>& free) const {
    for (const int64_t b : neighbours_[a]) {
      if (free[b]) return b;
    }
    int64_t best = kNone;
    for (int64_t b = 0; b < n_; ++b) {
      if (free[b] && (best == kNone || distance(a, b) < distance(a, best))) best = b;
    }
    return best;
  }

  // Points whose surroundings changed are looked at again, in the order of the changes.
  void improve() {
    queue_.assign(path_, path_ + placed_);
    queued_.assign(n_, 1);
    int64_t moves = kPathMovesPerPoint * n_;
    for (size_t head = 0; head < queue_.size(); ++head) {
      const int64_t a = queue_[head];
      queued_[a] = 0;
      while (moves > 0 && (reverse_at(a) || move_from(a))) --moves;
    }
  }

  void look_again(std::initializer_list<int64_t> points) {
    for (const int64_t a : points) {
      if (a == kNone || queued_[a]) continue;
      queued_[a] = 1;
      queue_.push_back(a);
    }
  }

  void update_positions(int64_t first, int64_t last) {
    for (int64_t i = first; i <= last; ++i) position_[path_[i]] = i;
  }

  // 2-opt: edges (a, b) and (c, e) become (a, c) and (b, e), where b and e are next to a and c on
  // the same side.
  bool reverse_at(int64_t a) {
    for (const int64_t side : {1, -1}) {
      const int64_t i = position_[a], b = at(i + side);
      const T ab = distance(a, b);
      for (const int64_t c : neighbours_[a]) {
        const T ac = distance(a, c);
        if (!(ac < ab)) break;  // the gain is found from an end where the new edge is the shorter
        const int64_t j = position_[c], e = at(j + side);
        const T ce = distance(c, e);
        if (!worthwhile(ab + ce - ac - distance(b, e), ab + ce)) continue;
        const int64_t first = std::min(i, j) + (side > 0), last = std::max(i, j) - (side < 0);
        std::reverse(path_ + first, path_ + last + 1);
        update_positions(first, last);
        look_again({b, c, e});
        return true;
      }
    }
    return false;
  }

  // Or-opt: a short segment with `a` at one of its ends moves to where `a` has a near neighbour.
  bool move_from(int64_t a) {
    const int64_t i = position_[a];
    for (int64_t length = 1; length <= kPathSegment; ++length) {
      if (move_segment(a, i, i + length - 1)) return true;
      if (length > 1 && move_segment(a, i - length + 1, i)) return true;
    }
    return false;
  }

  bool move_segment(int64_t a, int64_t first, int64_t last) {
    if (first < 0 || last >= placed_) return false;
    const int64_t other = path_[first] == a ? path_[last] : path_[first];
    const int64_t before = at(first - 1), after = at(last + 1);
    const T removed = distance(before, path_[first]) + distance(path_[last], after);
    const T saved = removed - distance(before, after);
    for (const int64_t c : neighbours_[a]) {
      const T ac = distance(a, c);
      if (!(ac < saved)) break;
      const int64_t j = position_[c];
      if (first <= j && j <= last) continue;
      for (const int64_t side : {1, -1}) {
        // Between c and its neighbour e on that side, a next to c.
        const int64_t e = at(j + side);
        if (e == path_[first] || e == path_[last]) continue;  // where it is already
        const T ce = distance(c, e);
        if (!worthwhile(saved + ce - ac - distance(other, e), removed + ce)) continue;
        insert(first, last, side > 0 ? j : j - 1, side > 0 ? a : other);
        look_again({before, after, other, c, e});
        return true;
      }
    }
    return false;
  }

  // Moves path[first .. last] to just after position `target`, beginning with point `leader`.
  void insert(int64_t first, int64_t last, int64_t target, int64_t leader) {
    const int64_t length = last - first + 1;
    const int64_t low = std::min(first, target + 1), high = std::max(last, target);
    std::rotate(path_ + low, path_ + (target > last ? last + 1 : first), path_ + high + 1);
    int64_t* segment = path_ + (target > last ? target - length + 1 : target + 1);
    if (*segment != leader) std::reverse(segment, segment + length);
    update_positions(low, high);
  }

  const T* distances_;
  int64_t n_, placed_ = 0;
  int64_t* path_;
  std::vector<T> row_;             // distances from one point, and infinity
  std::vector<int64_t> position_;  // of each point on the path
  std::vector<Neighbours> neighbours_;
  std::vector<int64_t> near_;  // candidates
  std::vector<int64_t> queue_;
  std::vector<char> queued_;
};

template <typename T>
void short_path(const T* distances, int64_t n, int64_t* order) {
  ShortPath<T>(distances, n, order);
}

}  // namespace coded_torch
