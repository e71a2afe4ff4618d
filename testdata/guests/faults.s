# A guest without a kernel that reads from one page after the other that is not there,
# and looks in the page fault's handler whether CR2 says which. It counts faults at
# COUNT, and tells port 0x90 (1) of an address that is another, with that at WRONG.
#
# 64-bit mode, identity-mapped, loaded and entered at 0x1000.

	.set	COUNT, 0x2000
	.set	WRONG, 0x2008
	.set	IDT, 0x3000
	.set	gate, IDT+14*16

	.globl	_start
_start:
	movl	$0x8000, %esp
	movl	$fault, %eax		# an interrupt gate
	movw	%ax, gate
	movw	%cs, gate+2
	movl	$0x8e00, gate+4
	movq	$0, gate+8
	lidt	idtr
	movl	$1, %ebx
	shlq	$40, %rbx		# nothing is mapped there
	movq	%rbx, %rbp
again:	movq	(%rbx), %rax
next:	addq	$0x1008, %rbx
	andl	$0x3fffffff, %ebx
	orq	%rbp, %rbx
	jmp	again

fault:	movq	%cr2, %rax
	cmpq	%rax, %rbx
	je	1f
	movq	%rax, WRONG
	movb	$1, %al
	outb	%al, $0x90
1:	incl	COUNT
	movl	$0x8000, %esp		# what the fault has pushed is of no use
	jmp	next

idtr:	.word	0xfff
	.quad	IDT
