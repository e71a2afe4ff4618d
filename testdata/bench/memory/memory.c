// What the machines of the four-machine experiment do (run.sh):
//
//	memory once MIB    write to so much memory, and end
//	memory keep MIB    write to each page of so much memory, again and again
//
// In C, because a Go program wakes up a hundred times a second for its own sake, which
// in a guest of a PVM host is half of what the guest's kernel can do.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int once = argc == 3 && !strcmp(argv[1], "once");
	long mib = argc == 3 ? atol(argv[2]) : 0;

	if ((!once && (argc != 3 || strcmp(argv[1], "keep"))) || mib < 1 || mib > 1 << 20) {
		fprintf(stderr, "usage: memory once|keep MIB\n");
		return 2;
	}
	volatile char *b = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (b == MAP_FAILED) {
		perror("memory");
		return 1;
	}
	for (char n = 1;; n++) {
		for (long i = 0; i < mib << 20; i += 4096)
			b[i] = n;
		if (once)
			return 0;
		usleep(200000);
	}
}
