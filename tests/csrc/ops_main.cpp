// Checks operations on the CPU besides the trie; the test builds it with sanitizers. Products, attention,
// quantization and propagation are compared with sums in double. Prints how many comparisons it made.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "cemg/memory_cpu.h"
#include "cemg/propagate_cpu.h"
#include "cemg/quantize_cpu.h"
#include "cemg/row_math.h"
#include "random_weights.h"

namespace {

void check_linear(int64_t rows, int64_t in, int64_t out, bool bias, int64_t threads) {
  Weights weights;
  const cemg::Linear linear = weights.linear(in, out, bias);
  const int64_t stride = cemg::padded_stride(in);
  const auto x = draw(weights.random, (rows - 1) * stride + in), before = draw(weights.random, rows * out);
  auto result = before;
  cemg::Epilogue epilogue;
  epilogue.add_out = true;
  std::vector<float> totals(static_cast<size_t>(rows));
  cemg::RowLogSumExp row_logsumexp;
  cemg::ThreadPool pool(threads);
  cemg::run_with_workers(pool, [&] {
    cemg::linear(linear, {x.data(), stride}, rows, epilogue, {result.data(), out}, pool);
    row_logsumexp.compute(linear, {x.data(), stride}, rows, totals.data(), pool);
  });
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0;
    for (int64_t c = 0; c < out; ++c) {
      double sum = bias ? linear.bias[c] : 0;
      for (int64_t k = 0; k < in; ++k) {
        sum += static_cast<double>(x[r * stride + k]) * linear.panels[(c / 32 * in + k) * 32 + c % 32];
      }
      total += std::exp(sum);
      require(std::abs(sum + before[r * out + c] - result[r * out + c]) < 1e-3,
              "a product is close to the sum in double");
    }
    require(std::abs(std::log(total) - totals[r]) < 1e-3,
            "the log-sum-exp of a row is close to that in double");
  }
}

// Logits of -inf, which a bias makes, add nothing to the log-sum-exp. If all are -inf, it is too.
void check_logsumexp_of_neg_inf() {
  Weights weights;
  const int64_t rows = 3, in = 5, out = 300;
  cemg::Linear linear = weights.linear(in, out);
  const auto x = draw(weights.random, rows * in);
  cemg::ThreadPool pool(1);
  cemg::RowLogSumExp row_logsumexp;
  const auto total = [&](int64_t first) {  // of row 1, with the logits before `first` at -inf
    std::vector<float> bias(static_cast<size_t>(out), 0.0f), totals(static_cast<size_t>(rows));
    std::fill(bias.begin(), bias.begin() + first, cemg::kNegInf);
    linear.bias = bias.data();
    row_logsumexp.compute(linear, {x.data(), in}, rows, totals.data(), pool);
    return totals[1];
  };
  for (int64_t first : {1, 32, 200, 299}) {
    double sum = 0;
    for (int64_t c = first; c < out; ++c) {
      double logit = 0;
      for (int64_t k = 0; k < in; ++k) {
        logit += static_cast<double>(x[in + k]) * linear.panels[(c / 32 * in + k) * 32 + c % 32];
      }
      sum += std::exp(logit);
    }
    require(std::abs(std::log(sum) - total(first)) < 1e-3, "logits of -inf add nothing to the log-sum-exp");
  }
  require(total(out) == cemg::kNegInf, "the log-sum-exp of logits that are all -inf is -inf");
}

// An exception of the program reaches the caller, and the pool can be used again.
void check_exceptions(int64_t threads) {
  cemg::ThreadPool pool(threads);
  bool caught = false;
  try {
    cemg::run_with_workers(pool, [] { throw std::bad_alloc(); });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  int64_t done = 0;
  cemg::run_with_workers(pool, [&] { pool.parallel_for(1, 1, [&](cemg::TaskRange) { ++done; }); });
  require(caught && done == 1, "an exception reaches the caller and the pool works afterwards");
}

// Consecutive loops, some large enough for several threads: each task runs once, before the next loop begins.
void check_thread_pool(int64_t threads, int jobs) {
  cemg::ThreadPool pool(threads);
  std::vector<std::thread> workers;
  for (int64_t t = 1; t < threads; ++t) workers.emplace_back([&, t] { pool.run_worker(t); });
  std::mt19937 random(3);
  std::vector<int> done(100);
  for (int job = 1; job <= jobs; ++job) {
    const auto tasks = static_cast<int64_t>(random() % done.size());
    pool.parallel_for(tasks, int64_t{1} << random() % 20, [&](cemg::TaskRange some) {
      for (int64_t task = some.begin; task < some.end; ++task) ++done[task];
    });
    for (auto& count : done) {
      require(count == (&count < done.data() + tasks ? 1 : 0), "each task runs exactly once");
      count = 0;
    }
  }
  pool.stop();
  for (std::thread& worker : workers) worker.join();
}

void check_attention(std::mt19937& random, int64_t queries, int64_t keys, int64_t size) {
  const auto query = draw(random, queries * size), key = draw(random, keys * size),
             value = draw(random, keys * size), bias = draw(random, 2 * (queries + keys));
  std::vector<float> out(query.size()), lse(static_cast<size_t>(queries));
  std::vector<float> packed_keys(static_cast<size_t>(size * cemg::padded(keys))),
      packed_values(static_cast<size_t>(keys * cemg::padded(size)));
  const cemg::PackedHead head{packed_keys.data(), packed_values.data(), keys};
  cemg::pack_head(key.data(), value.data(), size, size, head);
  std::vector<int32_t> positions(static_cast<size_t>(std::max(queries, keys)));
  for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int32_t>(i);
  const int64_t causal_offset = queries <= keys ? keys - queries : -1;
  const float* const middle = bias.data() + queries + keys;
  cemg::attend({query.data(), size, queries, size}, head, 0.5f,
               {causal_offset, middle, positions.data(), positions.data()}, out.data(), size, lse.data(), 1,
               cemg::AttentionWorkspace::of_thread());
  for (int64_t q = 0; q < queries; ++q) {
    std::vector<double> expected(static_cast<size_t>(size));
    double total = 0;
    for (int64_t k = 0; k < (causal_offset < 0 ? keys : causal_offset + q + 1); ++k) {
      double score = middle[k - q];
      for (int64_t d = 0; d < size; ++d) score += 0.5 * query[q * size + d] * key[k * size + d];
      total += std::exp(score);
      for (int64_t d = 0; d < size; ++d) expected[d] += std::exp(score) * value[k * size + d];
    }
    require(std::abs(std::log(total) - lse[q]) < 1e-3, "the log-sum-exp of attention scores");
    for (int64_t d = 0; d < size; ++d) {
      require(std::abs(expected[d] / total - out[q * size + d]) < 1e-3,
              "a row of attention is close to that in double");
    }
  }
}

void check_quantize(std::mt19937& random, int64_t rows, int64_t levels, int64_t size, int64_t dim) {
  const auto x = draw(random, rows * dim), vectors = draw(random, levels * size * dim);
  std::vector<int64_t> codes(static_cast<size_t>(rows * levels));
  std::vector<float> quantized(x.size());
  cemg::residual_quantize(x.data(), rows, {levels, size, dim, vectors.data()}, codes.data(),
                          quantized.data());
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> residual(x.begin() + r * dim, x.begin() + (r + 1) * dim);
    for (int64_t m = 0; m < levels; ++m) {
      int64_t nearest = 0;
      double least = 1e300;
      for (int64_t k = 0; k < size; ++k) {
        double distance = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const double off = static_cast<double>(residual[d]) - vectors[(m * size + k) * dim + d];
          distance += off * off;
        }
        if (distance < least) nearest = k;
        least = std::min(least, distance);
      }
      require(codes[r * levels + m] == nearest, "the code is the nearest one");
      for (int64_t d = 0; d < dim; ++d) residual[d] -= vectors[(m * size + nearest) * dim + d];
    }
  }
}

// A path with an edge from every third vertex to the first, and one vertex without neighbours.
void check_propagate(std::mt19937& random, int64_t vertices, int64_t dim, int64_t layers) {
  std::vector<std::vector<int64_t>> near(static_cast<size_t>(vertices));
  const auto join = [&](int64_t a, int64_t b) {
    near[a].push_back(b);
    near[b].push_back(a);
  };
  for (int64_t v = 0; v + 2 < vertices; ++v) join(v, v + 1);
  for (int64_t v = 3; v + 1 < vertices; v += 3) join(v, 0);
  std::vector<int64_t> row_ptr{0}, neighbours;
  std::vector<float> scale;
  for (const auto& adjacent : near) {
    neighbours.insert(neighbours.end(), adjacent.begin(), adjacent.end());
    row_ptr.push_back(static_cast<int64_t>(neighbours.size()));
    scale.push_back(adjacent.empty() ? 0.0f : 1.0f / std::sqrt(static_cast<float>(adjacent.size())));
  }
  const auto x = draw(random, vertices * dim);
  std::vector<float> out(x.size()), scratch(x.size());
  cemg::lightgcn_propagate({vertices, row_ptr.data(), neighbours.data(), scale.data()}, x.data(), dim, layers,
                           out.data(), scratch.data());
  std::vector<double> now(x.begin(), x.end()), sum = now;
  for (int64_t layer = 0; layer < layers; ++layer) {
    std::vector<double> next(now.size());
    for (int64_t v = 0; v < vertices; ++v) {
      for (const int64_t w : near[v]) {
        const double weight = static_cast<double>(scale[v]) * scale[w];
        for (int64_t d = 0; d < dim; ++d) next[v * dim + d] += weight * now[w * dim + d];
      }
    }
    now = next;
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += now[i];
  }
  for (size_t i = 0; i < sum.size(); ++i) {
    require(std::abs(sum[i] / static_cast<double>(layers + 1) - out[i]) < 1e-4,
            "a propagated value is close to that in double");
  }
}

}  // namespace

struct RandomRows {
  std::vector<int64_t> starts{0};
  std::vector<int32_t> items;
  std::vector<float> values;

  RandomRows(std::mt19937& random, int64_t rows, int32_t num_items) {
    for (int64_t row = 0; row < rows; ++row) {
      for (uint32_t entry = random() % 40; entry > 0; --entry) {
        items.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(num_items)));
        values.push_back(static_cast<float>(random() % 4));
      }
      starts.push_back(static_cast<int64_t>(items.size()));
    }
  }

  cemg::SparseRows view(int64_t top) const {
    return {starts.data(), items.data(), values.data(), static_cast<int64_t>(starts.size()) - 1, top};
  }

  void add(int64_t row, int64_t top, double weight, const double* factors,
           std::map<int32_t, double>& sums) const {
    if (row + 1 >= static_cast<int64_t>(starts.size())) return;
    const int64_t end = std::min(starts[row] + top, starts[row + 1]);
    for (int64_t i = starts[row]; i < end; ++i) {
      sums[items[i]] += weight * values[i] * (factors == nullptr ? 1 : factors[items[i]]);
    }
  }
};

// Some rows of the history are beyond those of the similarity.
void check_memory(std::mt19937& random, int32_t num_items, int64_t size, bool texts, bool repeats) {
  const int64_t rows = std::min(num_items, 3000);
  const RandomRows transitions(random, rows, num_items), similar(random, rows / 2, num_items);
  std::vector<double> factors(static_cast<size_t>(num_items)), first, second, third;
  for (double& factor : factors) factor = static_cast<double>(random() % 4) / 2;
  std::vector<int64_t> history;
  std::map<int32_t, double> sums;
  for (int64_t i = 0; i < size; ++i) {
    history.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(rows)));
    for (auto* weights : {&first, &second, &third}) weights->push_back(static_cast<double>(random() % 3));
    transitions.add(history.back(), 20, first.back(), factors.data(), sums);
    if (texts) similar.add(history.back(), 30, second.back(), nullptr, sums);
    if (repeats) sums[static_cast<int32_t>(history.back())] += third.back();
  }
  const cemg::MemoryQuery query = {
      history.data(), first.data(),  texts ? second.data() : nullptr, repeats ? third.data() : nullptr,
      size,           factors.data()};
  std::vector<int32_t> items(static_cast<size_t>(size * 51));
  std::vector<double> scores(items.size());
  const int64_t count =
      cemg::memory_scores(transitions.view(20), similar.view(30), query, items.data(), scores.data());
  int64_t at = 0;
  for (const auto& [item, sum] : sums) {
    if (sum == 0) continue;
    require(at < count && items[at] == item && std::abs(scores[at] - sum) < 1e-9, "memory_scores");
    ++at;
  }
  require(at == count, "the number of memory_scores");
}

int main() {
  std::mt19937 random(1);
  int compared = 0;
  for (int64_t rows : {1, 3, 14, 40}) {
    for (int64_t in : {1, 7, 64}) {
      check_linear(rows, in, 1 + (rows * in) % 70, in > 1, 1 + in % 2);
      ++compared;
    }
  }
  check_linear(5, 1024, 33, false, 1);
  check_linear(50, 600, 500, true, 3);  // tiles that prefetch
  check_logsumexp_of_neg_inf();
  check_thread_pool(3, 20000);
  check_exceptions(3);
  for (int64_t queries : {1, 6, 7, 70}) {
    for (int64_t keys : {1, 5, 32, 71}) {
      check_attention(random, queries, keys, 1 + (queries + keys) % 40);
      ++compared;
    }
  }
  for (int64_t dim : {1, 7, 8, 17, 31, 33, 64, 100, 200}) {
    check_quantize(random, 1 + dim % 30, 3, 1 + dim, dim);
    check_propagate(random, 2 + dim % 50, dim, dim % 4);
    compared += 2;
  }
  for (int32_t num_items : {2, 300, 5000, 5'000'000}) {
    for (int64_t size : {0, 1, 20}) {
      check_memory(random, num_items, size, size > 1, num_items < 5000);
      ++compared;
    }
  }
  std::printf("%d comparisons\n", compared + 3);  // and those outside of loops
  return 0;
}
