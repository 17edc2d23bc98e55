// main_test.cpp
// Owns:     main() of the unit tests; every other tests/*_test.cpp only adds cases.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
