// candle's kernels, as far as training calls them.
#pragma once
#include <functional>
#include <string>

// What a launch with these arguments does.
std::function<void()> candle_kernel(const std::string& name, void** arguments);
