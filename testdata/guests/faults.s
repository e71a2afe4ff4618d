# A guest without a kernel that reads from one page after the other that is not there,
# and looks in the page fault's handler whether CR2 says which. It counts faults at
# COUNT, and tells port 0x90 (1) of an address that is another, with that at WRONG.
#
# 32-bit protected mode, loaded and entered at 0x1000; it switches paging on.

	.set	COUNT, 0x2000
	.set	WRONG, 0x2008
	.set	IDT, 0x3000
	.set	PAGES, 0x4000		# the page directory
	.set	absent, 0x40000000

	.globl	_start
_start:
	movl	$0x8000, %esp
	movl	$fault, %eax		# an interrupt gate
	movw	%ax, IDT+14*8
	movw	%cs, IDT+14*8+2
	movw	$0x8e00, IDT+14*8+4
	shrl	$16, %eax
	movw	%ax, IDT+14*8+6
	lidt	idtr
	movl	$0x83, PAGES		# the first 4 MiB, and nothing else
	movl	%cr4, %eax
	orl	$0x10, %eax
	movl	%eax, %cr4
	movl	$PAGES, %eax
	movl	%eax, %cr3
	movl	%cr0, %eax
	orl	$0x80000000, %eax
	movl	%eax, %cr0
	movl	$absent, %ebx
again:	movl	(%ebx), %eax
	addl	$0x1004, %ebx
	orl	$absent, %ebx
	jmp	again

fault:	movl	%cr2, %eax
	cmpl	%eax, %ebx
	je	1f
	movl	%eax, WRONG
	movb	$1, %al
	outb	%al, $0x90
1:	incl	COUNT
	addl	$2, 4(%esp)		# behind the instruction
	addl	$4, %esp		# the error code
	iretl

idtr:	.word	0x7ff
	.long	IDT
