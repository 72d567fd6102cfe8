#include "cuda/kernels/regression_loss.cu"

#include "case.h"

namespace {

using namespace fastdni;

template <class T>
void run(simt::Case& io) {
  using A = accumulate_t<T>;
  const int64_t n = io.integer("n");
  const int64_t offset = io.integer("offset", 0);
  const int64_t blocks = cuda::regression_loss_plan(n).blocks;
  const T* prediction = io.input<T>(n, offset);
  const T* target = io.input<T>(n);
  A* error = io.output<A>(n);
  A* loss = io.output<A>(1);
  *io.output<int64_t>(1) = blocks;
  // One block needs no partial sums: none are there to be touched.
  A* partials = io.scratch<A>(blocks == 1 ? 0 : blocks);
  const double divisor = io.real("divisor");
  cuda::launch_regression_loss<T>({prediction, target, error, loss, partials, n, divisor}, nullptr);
}

const simt::Register kCase("regression_loss", [](simt::Case& io) {
  simt::for_dtype<float, double, bfloat16>(io.text("dtype"),
                                           [&](auto zero) { run<decltype(zero)>(io); });
});

}  // namespace
