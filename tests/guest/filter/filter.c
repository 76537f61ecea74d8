// SPDX-License-Identifier: GPL-2.0
/*
 * Attach a classic socket filter, which the kernel compiles (net/core/filter.c), and hold it.
 *
 *   filter & filter's standard output says "attached" once the compiled code is in memory
 */
#include <linux/filter.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
	/* Accept IPv4 packets of a link layer frame, drop everything else. */
	struct sock_filter instructions[] = {
		BPF_STMT(BPF_LD | BPF_H | BPF_ABS, 12),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0x0800, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, 0xffff),
		BPF_STMT(BPF_RET | BPF_K, 0),
	};
	struct sock_fprog program = {
		.len = sizeof(instructions) / sizeof(instructions[0]),
		.filter = instructions,
	};
	int sock = socket(AF_UNIX, SOCK_DGRAM, 0);

	if (sock < 0 ||
	    setsockopt(sock, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)) < 0) {
		perror("filter");
		return 1;
	}
	puts("attached");
	fflush(stdout);
	for (;;)
		pause();
}
