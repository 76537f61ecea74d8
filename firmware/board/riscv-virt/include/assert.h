/* What a compiler without a library lacks of C11. */
#ifndef PS_ASSERT_H
#define PS_ASSERT_H

#define static_assert _Static_assert

#endif
