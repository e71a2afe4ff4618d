package emul

// pureTable lists the instructions that are executed natively: pure functions of
// general and vector registers, arithmetic flags and at most one memory operand
// that is either read or written. A line is: name, encodings, opcode, memory
// operand, options.
//
// Encodings: s legacy SSE, v VEX, e EVEX, x x87, g legacy on general registers, b
// VEX on general registers.
//
// Opcode: mandatory prefix (NP: none), map, opcode, with /digit for ModRM.reg.
//
// Memory operand: its size, with > if it is written: a number of bytes, V for the
// vector length, V/2 …, y for the operand size (2, 4, 8), z for 4 or 8 by W; - for
// registers only. It must be aligned with "!" in every encoding, in the legacy
// encoding also when it is a whole vector, unless marked u.
//
// Options: m memory only; ib immediate byte; bare no ModRM; nv no operand in
// vvvv; gr, gm, gv: reg, rm, vvvv is a general register; kr, km: an opmask
// register; w0, w1 the required W (in a line of several encodings: of EVEX), w W is
// part of the operation, otherwise W is ignored; l0, l1, l2 the vector length must be 128, at least 256, 512 bits; f
// AVX suffices for 256 bits, a2 AVX2 is needed even for 128; b4, b8 the element
// size of embedded broadcast; nk no opmask; features by their names.
const pureTable = `
emms        x    NP.0F.77       -      bare
fild        x    NP.00.DB/0     4      m

lzcnt       g    F3.0F.BD       y      gr gm
tzcnt       g    F3.0F.BC       y      gr gm
movnti      g    NP.0F.C3       >z     m gr
movbe       g    NP.0F38.F0     y      m gr MOVBE
movbe       g    66.0F38.F0     y      m gr MOVBE
movbe       g    NP.0F38.F1     >y     m gr MOVBE
movbe       g    66.0F38.F1     >y     m gr MOVBE
crc32       g    F2.0F38.F0     1      gr gm SSE4.2
crc32       g    F2.0F38.F1     y      gr gm SSE4.2
adcx        g    66.0F38.F6     z      gr gm ADX
adox        g    F3.0F38.F6     z      gr gm ADX
andn        b    NP.0F38.F2     z      gr gm gv BMI1
bextr       b    NP.0F38.F7     z      gr gm gv BMI1
blsr        b    NP.0F38.F3/1   z      gm gv BMI1
blsmsk      b    NP.0F38.F3/2   z      gm gv BMI1
blsi        b    NP.0F38.F3/3   z      gm gv BMI1
bzhi        b    NP.0F38.F5     z      gr gm gv BMI2
pext        b    F3.0F38.F5     z      gr gm gv BMI2
pdep        b    F2.0F38.F5     z      gr gm gv BMI2
mulx        b    F2.0F38.F6     z      gr gm gv BMI2
shlx        b    66.0F38.F7     z      gr gm gv BMI2
sarx        b    F3.0F38.F7     z      gr gm gv BMI2
shrx        b    F2.0F38.F7     z      gr gm gv BMI2
rorx        b    F2.0F3A.F0     z      ib nv gr gm BMI2

vzeroupper  v    NP.0F.77       -      bare nv f

movups      sv   NP.0F.10       Vu     nv f
movupd      sv   66.0F.10       Vu     nv f
movss       sv   F3.0F.10       4      m nv l0
movss       sv   F3.0F.10       -      l0
movsd       sv   F2.0F.10       8      m nv l0
movsd       sv   F2.0F.10       -      l0
movups      sv   NP.0F.11       >Vu    nv f
movupd      sv   66.0F.11       >Vu    nv f
movss       sv   F3.0F.11       >4     m nv l0
movss       sv   F3.0F.11       -      l0
movsd       sv   F2.0F.11       >8     m nv l0
movsd       sv   F2.0F.11       -      l0
movlps      sv   NP.0F.12       8      l0
movlpd      sv   66.0F.12       8      m l0
movddup     sv   F2.0F.12       8      nv l0 SSE3
movsldup    sv   F3.0F.12       V      nv f SSE3
movlps      sv   NP.0F.13       >8     m nv l0
movlpd      sv   66.0F.13       >8     m nv l0
unpcklps    sv   NP.0F.14       V      f
unpcklpd    sv   66.0F.14       V      f
unpckhps    sv   NP.0F.15       V      f
unpckhpd    sv   66.0F.15       V      f
movhps      sv   NP.0F.16       8      l0
movhpd      sv   66.0F.16       8      m l0
movshdup    sv   F3.0F.16       V      nv f SSE3
movhps      sv   NP.0F.17       >8     m nv l0
movhpd      sv   66.0F.17       >8     m nv l0
movaps      sv   NP.0F.28       V!     nv f
movapd      sv   66.0F.28       V!     nv f
movaps      sv   NP.0F.29       >V!    nv f
movapd      sv   66.0F.29       >V!    nv f
movntps     sv   NP.0F.2B       >V!    m nv f
movntpd     sv   66.0F.2B       >V!    m nv f
movmskps    sv   NP.0F.50       -      nv f gr
movmskpd    sv   66.0F.50       -      nv f gr
andps       sv   NP.0F.54       V      f
andpd       sv   66.0F.54       V      f
andnps      sv   NP.0F.55       V      f
andnpd      sv   66.0F.55       V      f
orps        sv   NP.0F.56       V      f
orpd        sv   66.0F.56       V      f
xorps       sv   NP.0F.57       V      f
xorpd       sv   66.0F.57       V      f
shufps      sv   NP.0F.C6       V      ib f
shufpd      sv   66.0F.C6       V      ib f

punpcklbw   sve  66.0F.60       V      AVX512BW
punpcklwd   sve  66.0F.61       V      AVX512BW
punpckldq   sv   66.0F.62       V
packsswb    sve  66.0F.63       V      AVX512BW
pcmpgtb     sv   66.0F.64       V
pcmpgtw     sv   66.0F.65       V
pcmpgtd     sv   66.0F.66       V
packuswb    sve  66.0F.67       V      AVX512BW
punpckhbw   sve  66.0F.68       V      AVX512BW
punpckhwd   sve  66.0F.69       V      AVX512BW
punpckhdq   sv   66.0F.6A       V
packssdw    sv   66.0F.6B       V
punpcklqdq  sv   66.0F.6C       V
punpckhqdq  sv   66.0F.6D       V
movd        sv   66.0F.6E       z      w nv l0 gm
movdqa      sv   66.0F.6F       V!     nv f
movdqu      sv   F3.0F.6F       Vu     nv f
pshufd      sv   66.0F.70       V      ib nv
pshufhw     sve  F3.0F.70       V      ib nv AVX512BW
pshuflw     sve  F2.0F.70       V      ib nv AVX512BW
psrlw       sv   66.0F.71/2     -      ib
psraw       sv   66.0F.71/4     -      ib
psllw       sv   66.0F.71/6     -      ib
psrld       sv   66.0F.72/2     -      ib
psrad       sv   66.0F.72/4     -      ib
pslld       sv   66.0F.72/6     -      ib
psrlq       sv   66.0F.73/2     -      ib
psrldq      sv   66.0F.73/3     -      ib
psllq       sv   66.0F.73/6     -      ib
pslldq      sv   66.0F.73/7     -      ib
pcmpeqb     sv   66.0F.74       V
pcmpeqw     sv   66.0F.75       V
pcmpeqd     sv   66.0F.76       V
movd        sv   66.0F.7E       >z     w nv l0 gm
movq        sv   F3.0F.7E       8      nv l0
movdqa      sv   66.0F.7F       >V!    nv f
movdqu      sv   F3.0F.7F       >Vu    nv f
pinsrw      sv   66.0F.C4       2      ib l0 gm
pextrw      sv   66.0F.C5       -      ib nv l0 gr
psrlw       sve  66.0F.D1       16     AVX512BW
psrld       sve  66.0F.D2       16     w0
psrlq       sve  66.0F.D3       16     w1
paddq       sv   66.0F.D4       V
pmullw      sve  66.0F.D5       V      AVX512BW
movq        sv   66.0F.D6       >8     nv l0
pmovmskb    sv   66.0F.D7       -      nv gr
psubusb     sve  66.0F.D8       V      AVX512BW
psubusw     sve  66.0F.D9       V      AVX512BW
pminub      sve  66.0F.DA       V      AVX512BW
pand        sv   66.0F.DB       V
paddusb     sve  66.0F.DC       V      AVX512BW
paddusw     sve  66.0F.DD       V      AVX512BW
pmaxub      sve  66.0F.DE       V      AVX512BW
pandn       sv   66.0F.DF       V
pavgb       sve  66.0F.E0       V      AVX512BW
psraw       sve  66.0F.E1       16     AVX512BW
psrad       sve  66.0F.E2       16     w0
pavgw       sve  66.0F.E3       V      AVX512BW
pmulhuw     sve  66.0F.E4       V      AVX512BW
pmulhw      sve  66.0F.E5       V      AVX512BW
movntdq     sve  66.0F.E7       >V!    m nv f nk
psubsb      sve  66.0F.E8       V      AVX512BW
psubsw      sve  66.0F.E9       V      AVX512BW
pminsw      sve  66.0F.EA       V      AVX512BW
por         sv   66.0F.EB       V
paddsb      sve  66.0F.EC       V      AVX512BW
paddsw      sve  66.0F.ED       V      AVX512BW
pmaxsw      sve  66.0F.EE       V      AVX512BW
pxor        sv   66.0F.EF       V
lddqu       sv   F2.0F.F0       Vu     m nv f SSE3
psllw       sve  66.0F.F1       16     AVX512BW
pslld       sve  66.0F.F2       16     w0
psllq       sve  66.0F.F3       16     w1
pmuludq     sv   66.0F.F4       V
pmaddwd     sve  66.0F.F5       V      AVX512BW
psadbw      sve  66.0F.F6       V      nk AVX512BW
psubb       sve  66.0F.F8       V      AVX512BW
psubw       sve  66.0F.F9       V      AVX512BW
psubd       sv   66.0F.FA       V
psubq       sv   66.0F.FB       V
paddb       sve  66.0F.FC       V      AVX512BW
paddw       sve  66.0F.FD       V      AVX512BW
paddd       sv   66.0F.FE       V

pshufb      sve  66.0F38.00     V      SSSE3 AVX512BW
phaddw      sv   66.0F38.01     V      SSSE3
phaddd      sv   66.0F38.02     V      SSSE3
phaddsw     sv   66.0F38.03     V      SSSE3
pmaddubsw   sve  66.0F38.04     V      SSSE3 AVX512BW
phsubw      sv   66.0F38.05     V      SSSE3
phsubd      sv   66.0F38.06     V      SSSE3
phsubsw     sv   66.0F38.07     V      SSSE3
psignb      sv   66.0F38.08     V      SSSE3
psignw      sv   66.0F38.09     V      SSSE3
psignd      sv   66.0F38.0A     V      SSSE3
pmulhrsw    sve  66.0F38.0B     V      SSSE3 AVX512BW
pabsb       sve  66.0F38.1C     V      nv SSSE3 AVX512BW
pabsw       sve  66.0F38.1D     V      nv SSSE3 AVX512BW
pabsd       sv   66.0F38.1E     V      nv SSSE3
pblendvb    s    66.0F38.10     V      SSE4.1
ptest       sv   66.0F38.17     V      nv f SSE4.1
pmovsxbw    sve  66.0F38.20     V/2u   nv SSE4.1 AVX512BW
pmovsxbd    sve  66.0F38.21     V/4u   nv SSE4.1
pmovsxbq    sve  66.0F38.22     V/8u   nv SSE4.1
pmovsxwd    sve  66.0F38.23     V/2u   nv SSE4.1
pmovsxwq    sve  66.0F38.24     V/4u   nv SSE4.1
pmovsxdq    sve  66.0F38.25     V/2u   nv w0 SSE4.1
pmuldq      sv   66.0F38.28     V      SSE4.1
pcmpeqq     sv   66.0F38.29     V      SSE4.1
movntdqa    sve  66.0F38.2A     V!     m nv nk w0 SSE4.1
packusdw    sv   66.0F38.2B     V      SSE4.1
pmovzxbw    sve  66.0F38.30     V/2u   nv SSE4.1 AVX512BW
pmovzxbd    sve  66.0F38.31     V/4u   nv SSE4.1
pmovzxbq    sve  66.0F38.32     V/8u   nv SSE4.1
pmovzxwd    sve  66.0F38.33     V/2u   nv SSE4.1
pmovzxwq    sve  66.0F38.34     V/4u   nv SSE4.1
pmovzxdq    sve  66.0F38.35     V/2u   nv w0 SSE4.1
pcmpgtq     sv   66.0F38.37     V      SSE4.2
pminsb      sve  66.0F38.38     V      SSE4.1 AVX512BW
pminsd      sv   66.0F38.39     V      SSE4.1
pminuw      sve  66.0F38.3A     V      SSE4.1 AVX512BW
pminud      sv   66.0F38.3B     V      SSE4.1
pmaxsb      sve  66.0F38.3C     V      SSE4.1 AVX512BW
pmaxsd      sv   66.0F38.3D     V      SSE4.1
pmaxuw      sve  66.0F38.3E     V      SSE4.1 AVX512BW
pmaxud      sv   66.0F38.3F     V      SSE4.1
pmulld      sv   66.0F38.40     V      SSE4.1
phminposuw  sv   66.0F38.41     V      nv l0 SSE4.1
sha1nexte   s    NP.0F38.C8     V      SHA
sha1msg1    s    NP.0F38.C9     V      SHA
sha1msg2    s    NP.0F38.CA     V      SHA
sha256rnds2 s    NP.0F38.CB     V      SHA
sha256msg1  s    NP.0F38.CC     V      SHA
sha256msg2  s    NP.0F38.CD     V      SHA
sha1rnds4   s    NP.0F3A.CC     V      ib SHA
aesimc      sv   66.0F38.DB     V      nv l0 AES
aesenc      sve  66.0F38.DC     V      nk AES VAES
aesenclast  sve  66.0F38.DD     V      nk AES VAES
aesdec      sve  66.0F38.DE     V      nk AES VAES
aesdeclast  sve  66.0F38.DF     V      nk AES VAES
aeskeygenassist sv 66.0F3A.DF   V      ib nv l0 AES
pblendw     sv   66.0F3A.0E     V      ib SSE4.1
palignr     sve  66.0F3A.0F     V      ib SSSE3 AVX512BW
pextrb      sv   66.0F3A.14     >1     ib nv l0 gm SSE4.1
pextrw      sv   66.0F3A.15     >2     ib nv l0 gm SSE4.1
pextrd      sv   66.0F3A.16     >z     ib w nv l0 gm SSE4.1
extractps   sv   66.0F3A.17     >4     ib nv l0 gm SSE4.1
pinsrb      sv   66.0F3A.20     1      ib l0 gm SSE4.1
insertps    sv   66.0F3A.21     4      ib l0 SSE4.1
pinsrd      sv   66.0F3A.22     z      ib w l0 gm SSE4.1
pclmulqdq   sve  66.0F3A.44     V      ib nk PCLMULQDQ VPCLMULQDQ

vpermilps   v    66.0F38.0C     V      w0 f
vpermps     v    66.0F38.16     V      w0 l1
vbroadcastss v   66.0F38.18     4      w0 nv m f
vbroadcastss v   66.0F38.18     -      w0 nv a2
vbroadcastsd v   66.0F38.19     8      w0 nv m l1 f
vbroadcastsd v   66.0F38.19     -      w0 nv l1
vbroadcastf128 v 66.0F38.1A     16     w0 nv m l1 f
vpermd      v    66.0F38.36     V      w0 l1
vpsrlvd     v    66.0F38.45     V      w a2
vpsravd     v    66.0F38.46     V      w0 a2
vpsllvd     v    66.0F38.47     V      w a2
vpbroadcastd v   66.0F38.58     4      w0 nv a2
vpbroadcastq v   66.0F38.59     8      w0 nv a2
vbroadcasti128 v 66.0F38.5A     16     w0 nv m l1
vpbroadcastb v   66.0F38.78     1      w0 nv a2
vpbroadcastw v   66.0F38.79     2      w0 nv a2
vpermq      v    66.0F3A.00     V      ib w1 nv l1
vpermpd     v    66.0F3A.01     V      ib w1 nv l1
vpblendd    v    66.0F3A.02     V      ib w0 a2
vpermilps   v    66.0F3A.04     V      ib w0 nv f
vperm2f128  v    66.0F3A.06     V      ib w0 l1 f
vinsertf128 v    66.0F3A.18     16     ib w0 l1 f
vextractf128 v   66.0F3A.19     >16    ib w0 nv l1 f
vinserti128 v    66.0F3A.38     16     ib w0 l1
vextracti128 v   66.0F3A.39     >16    ib w0 nv l1
vperm2i128  v    66.0F3A.46     V      ib w0 l1
vpblendvb   v    66.0F3A.4C     V      ib w0

vmovups     e    NP.0F.10       V      nv w0
vmovupd     e    66.0F.10       V      nv w1
vmovups     e    NP.0F.11       >V     nv w0
vmovupd     e    66.0F.11       >V     nv w1
vmovaps     e    NP.0F.28       V!     nv w0
vmovapd     e    66.0F.28       V!     nv w1
vmovaps     e    NP.0F.29       >V!    nv w0
vmovapd     e    66.0F.29       >V!    nv w1
vmovdqa32   e    66.0F.6F       V!     nv w0
vmovdqa64   e    66.0F.6F       V!     nv w1
vmovdqu32   e    F3.0F.6F       V      nv w0
vmovdqu64   e    F3.0F.6F       V      nv w1
vmovdqu8    e    F2.0F.6F       V      nv w0 AVX512BW
vmovdqu16   e    F2.0F.6F       V      nv w1 AVX512BW
vmovdqa32   e    66.0F.7F       >V!    nv w0
vmovdqa64   e    66.0F.7F       >V!    nv w1
vmovdqu32   e    F3.0F.7F       >V     nv w0
vmovdqu64   e    F3.0F.7F       >V     nv w1
vmovdqu8    e    F2.0F.7F       >V     nv w0 AVX512BW
vmovdqu16   e    F2.0F.7F       >V     nv w1 AVX512BW
vpunpckldq  e    66.0F.62       V      w0 b4
vpunpckhdq  e    66.0F.6A       V      w0 b4
vpunpcklqdq e    66.0F.6C       V      w1 b8
vpunpckhqdq e    66.0F.6D       V      w1 b8
vpshufd     e    66.0F.70       V      ib nv w0 b4
vpsrlw      e    66.0F.71/2     V      ib AVX512BW
vpsraw      e    66.0F.71/4     V      ib AVX512BW
vpsllw      e    66.0F.71/6     V      ib AVX512BW
vprord      e    66.0F.72/0     V      ib w0 b4
vprorq      e    66.0F.72/0     V      ib w1 b8
vprold      e    66.0F.72/1     V      ib w0 b4
vprolq      e    66.0F.72/1     V      ib w1 b8
vpsrld      e    66.0F.72/2     V      ib w0 b4
vpsrad      e    66.0F.72/4     V      ib w0 b4
vpsraq      e    66.0F.72/4     V      ib w1 b8
vpslld      e    66.0F.72/6     V      ib w0 b4
vpsrlq      e    66.0F.73/2     V      ib w1 b8
vpsrldq     e    66.0F.73/3     V      ib nk AVX512BW
vpsllq      e    66.0F.73/6     V      ib w1 b8
vpslldq     e    66.0F.73/7     V      ib nk AVX512BW
vpcmpgtb    e    66.0F.64       V      kr AVX512BW
vpcmpgtw    e    66.0F.65       V      kr AVX512BW
vpcmpgtd    e    66.0F.66       V      kr w0 b4
vpcmpgtq    e    66.0F38.37     V      kr w1 b8
vpcmpeqb    e    66.0F.74       V      kr AVX512BW
vpcmpeqw    e    66.0F.75       V      kr AVX512BW
vpcmpeqd    e    66.0F.76       V      kr w0 b4
vpcmpeqq    e    66.0F38.29     V      kr w1 b8
vpcmpd      e    66.0F3A.1F     V      ib kr w0 b4
vpcmpq      e    66.0F3A.1F     V      ib kr w1 b8
vpcmpb      e    66.0F3A.3F     V      ib kr w0 AVX512BW
vptestmd    e    66.0F38.27     V      kr w0 b4
vptestmq    e    66.0F38.27     V      kr w1 b8
vpmovm2b    e    F3.0F38.28     -      nv nk km w0 AVX512BW
vpmovb2m    e    F3.0F38.29     -      nv nk kr w0 AVX512BW
vpaddd      e    66.0F.FE       V      w0 b4
vpaddq      e    66.0F.D4       V      w1 b8
vpsubd      e    66.0F.FA       V      w0 b4
vpsubq      e    66.0F.FB       V      w1 b8
vpandd      e    66.0F.DB       V      w0 b4
vpandq      e    66.0F.DB       V      w1 b8
vpandnd     e    66.0F.DF       V      w0 b4
vpandnq     e    66.0F.DF       V      w1 b8
vpord       e    66.0F.EB       V      w0 b4
vporq       e    66.0F.EB       V      w1 b8
vpxord      e    66.0F.EF       V      w0 b4
vpxorq      e    66.0F.EF       V      w1 b8
vpmuludq    e    66.0F.F4       V      w1 b8
vpmuldq     e    66.0F38.28     V      w1 b8
vpmulld     e    66.0F38.40     V      w0 b4
vpackssdw   e    66.0F.6B       V      w0 b4 AVX512BW
vpackusdw   e    66.0F38.2B     V      w0 b4 AVX512BW
vprorvd     e    66.0F38.14     V      w0 b4
vprorvq     e    66.0F38.14     V      w1 b8
vprolvd     e    66.0F38.15     V      w0 b4
vprolvq     e    66.0F38.15     V      w1 b8
vpsrlvw     e    66.0F38.10     V      w1 AVX512BW
vpsravw     e    66.0F38.11     V      w1 AVX512BW
vpsllvw     e    66.0F38.12     V      w1 AVX512BW
vpsrlvd     e    66.0F38.45     V      w0 b4
vpsrlvq     e    66.0F38.45     V      w1 b8
vpsravd     e    66.0F38.46     V      w0 b4
vpsravq     e    66.0F38.46     V      w1 b8
vpsllvd     e    66.0F38.47     V      w0 b4
vpsllvq     e    66.0F38.47     V      w1 b8
vpermd      e    66.0F38.36     V      w0 b4 l1
vpermq      e    66.0F38.36     V      w1 b8 l1
vpermi2d    e    66.0F38.76     V      w0 b4
vpermi2q    e    66.0F38.76     V      w1 b8
vpermt2d    e    66.0F38.7E     V      w0 b4
vpermt2q    e    66.0F38.7E     V      w1 b8
vpermb      e    66.0F38.8D     V      w0 AVX512_VBMI
vpermw      e    66.0F38.8D     V      w1 AVX512BW
vpopcntd    e    66.0F38.55     V      nv w0 b4 AVX512_VPOPCNTDQ
vpopcntq    e    66.0F38.55     V      nv w1 b8 AVX512_VPOPCNTDQ
vpbroadcastd e   66.0F38.58     4      nv w0
vpbroadcastq e   66.0F38.59     8      nv w1
vpbroadcastb e   66.0F38.78     1      nv w0 AVX512BW
vpbroadcastw e   66.0F38.79     2      nv w0 AVX512BW
vpbroadcastb e   66.0F38.7A     -      nv w0 gm AVX512BW
vpbroadcastw e   66.0F38.7B     -      nv w0 gm AVX512BW
vpbroadcastd e   66.0F38.7C     -      nv w gm
vbroadcasti32x4 e 66.0F38.5A    16     m nv w0 l1
vbroadcasti64x2 e 66.0F38.5A    16     m nv w1 l1 AVX512DQ
vbroadcasti32x8 e 66.0F38.5B    32     m nv w0 l2 AVX512DQ
vbroadcasti64x4 e 66.0F38.5B    32     m nv w1 l2
vpermq      e    66.0F3A.00     V      ib nv w1 b8 l1
valignd     e    66.0F3A.03     V      ib w0 b4
valignq     e    66.0F3A.03     V      ib w1 b8
vpternlogd  e    66.0F3A.25     V      ib w0 b4
vpternlogq  e    66.0F3A.25     V      ib w1 b8
vinserti32x4 e   66.0F3A.38     16     ib w0 l1
vinserti64x2 e   66.0F3A.38     16     ib w1 l1 AVX512DQ
vextracti32x4 e  66.0F3A.39     >16    ib nv w0 l1
vextracti64x2 e  66.0F3A.39     >16    ib nv w1 l1 AVX512DQ
vinserti32x8 e   66.0F3A.3A     32     ib w0 l2 AVX512DQ
vinserti64x4 e   66.0F3A.3A     32     ib w1 l2
vextracti32x8 e  66.0F3A.3B     >32    ib nv w0 l2 AVX512DQ
vextracti64x4 e  66.0F3A.3B     >32    ib nv w1 l2
vshufi32x4  e    66.0F3A.43     V      ib w0 b4 l1
vshufi64x2  e    66.0F3A.43     V      ib w1 b8 l1
`
