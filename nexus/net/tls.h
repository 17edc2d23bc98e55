// tls.h
// Owns:     the choice between a build with TLS and one without (make TLS=no).
// Promises: both have the same names; without TLS each context that is asked for is a problem that says so.
// Leaves:   everything else to the headers below.
// Threads:  none.
// Tested by: tests/tls_test.cpp
#pragma once

// Both need these: `make single` writes each header where it is included first.
#include "nexus/base/limits.h"
#include "nexus/config/settings.h"
#include "nexus/config/values.h"
#include "nexus/net/epoll.h"
#include "nexus/net/tls_outcome.h"

#ifdef NEXUS_NO_TLS
#include "nexus/net/tls_none.h"
#else
#include "nexus/net/tls_demo.h"
#include "nexus/net/tls_setup.h"
#include "nexus/net/tls_stream.h"
#endif
