// host_kernels <kernel> key=value...: runs one case, arrays on standard input and output.
// seed=N shuffles threads and blocks. Exit code 2 and one line for bad arguments.
#include "case.h"
#include "simt.h"

namespace {

void run(int argc, char** argv) {
  if (argc < 2) throw simt::BadArguments("usage: host_kernels <kernel> key=value...");
  const auto found = simt::cases().find(argv[1]);
  if (found == simt::cases().end()) {
    throw simt::BadArguments(std::string("unknown kernel ") + argv[1]);
  }
  std::map<std::string, std::string> parameters;
  for (int i = 2; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    if (equals == std::string::npos) throw simt::BadArguments(argument + " is not key=value");
    parameters[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  simt::Case io(parameters);
  if (parameters.contains("seed")) simt::shuffle_seed = io.integer("seed");
  found->second(io);
  io.check_all_used();
  io.write_outputs();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const simt::BadArguments& error) {
    std::fprintf(stderr, "host_kernels: %s\n", error.what());
    return 2;
  }
}
