/*
 * The smallest loop around KVM_RUN: what an exit costs with nothing on top.
 * Usage: exitloop pio|mmio COUNT. Prints nanoseconds per exit.
 *
 * The guest is 32-bit flat code without paging, the same as in the Go
 * benchmark: ESI counts down, each turn is one exit, HLT ends it.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static const unsigned char pio[] = {
	0xe6, 0x80,	/* again: out 0x80, al */
	0x4e,		/* dec esi */
	0x75, 0xfb,	/* jnz again */
	0xf4,		/* hlt */
};
static const unsigned char mmio[] = {
	0xa2, 0x00, 0x00, 0x00, 0xd0,	/* again: mov [0xd0000000], al */
	0x4e,				/* dec esi */
	0x75, 0xf8,			/* jnz again */
	0xf4,				/* hlt */
};

static void segment(struct kvm_segment *s, int code)
{
	memset(s, 0, sizeof *s);
	s->limit = 0xffffffff;
	s->selector = code ? 0x10 : 0x18;
	s->type = code ? 0xb : 3;
	s->present = s->db = s->s = s->g = 1;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		errx(2, "usage: exitloop pio|mmio COUNT");
	int is_mmio = !strcmp(argv[1], "mmio");
	int sys = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (sys < 0)
		err(1, "/dev/kvm");
	int vm = ioctl(sys, KVM_CREATE_VM, 0);
	if (vm < 0)
		err(1, "KVM_CREATE_VM");
	size_t size = 1 << 20;
	unsigned char *ram = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region slot = { .memory_size = size, .userspace_addr = (unsigned long)ram };
	if (ram == MAP_FAILED || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0)
		err(1, "memory");
	ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul);
	memcpy(ram + 0x1000, is_mmio ? mmio : pio, is_mmio ? sizeof mmio : sizeof pio);
	int cpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	int run_size = ioctl(sys, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_run *run = mmap(0, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
	if (cpu < 0 || run == MAP_FAILED)
		err(1, "vCPU");
	struct kvm_sregs s;
	ioctl(cpu, KVM_GET_SREGS, &s);
	segment(&s.cs, 1);
	segment(&s.ds, 0);
	s.es = s.fs = s.gs = s.ss = s.ds;
	s.cr0 |= 1;
	struct kvm_regs r = { .rip = 0x1000, .rflags = 2, .rsi = strtoul(argv[2], 0, 10) };
	if (ioctl(cpu, KVM_SET_SREGS, &s) < 0 || ioctl(cpu, KVM_SET_REGS, &r) < 0)
		err(1, "registers");
	struct timespec a, b;
	unsigned long n = 0;
	volatile unsigned char sink;
	clock_gettime(CLOCK_MONOTONIC, &a);
	for (;;) {
		if (ioctl(cpu, KVM_RUN, 0) < 0)
			err(1, "KVM_RUN");
		if (run->exit_reason == KVM_EXIT_HLT)
			break;
		if (run->exit_reason == KVM_EXIT_IO)
			sink = ((unsigned char *)run)[run->io.data_offset];
		else if (run->exit_reason == KVM_EXIT_MMIO)
			sink = run->mmio.data[0];
		else
			errx(1, "unexpected exit %u", run->exit_reason);
		n++;
	}
	clock_gettime(CLOCK_MONOTONIC, &b);
	(void)sink;
	printf("%.1f\n", ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec)) / n);
	return 0;
}
