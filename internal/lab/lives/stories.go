package lives

// story is what once went wrong, or comes near to it: runs begin with one of
// them and go astray.
type story struct {
	name  string
	steps []string
	open  string // the code of the fault that it shows and that is not mended yet
}

var stories = []story{
	{"a frozen disk moves", []string{
		"source s1 A d0 slow", "dest p1 B d0 A0", "write p1 d0 1 flush", "fast s1", "await p1",
	}, ""},
	{"a live disk moves", []string{
		"live s1 A d0", "write s1 d0 1", "dest p1 B d0 A0", "write s1 d0 2", "handoff s1", "write p1 d0 3 flush", "await p1",
	}, ""},
	{"two disks move together", []string{
		"live s1 A d0,d1", "dest p1 B d0,d1 A0", "write s1 d1 2", "handoff s1", "write p1 d0 3", "write p1 d1 4", "await p1",
	}, ""},
	{"a disk goes there and back", []string{
		"live s1 A d0", "dest p1 B d0 A0", "handoff s1", "write p1 d0 1", "await p1", "term p1",
		"live s2 B d0", "dest p2 A d0 B0 overwrite", "write s2 d0 2", "handoff s2", "await p2", "write p2 d0 3", "term p2",
		"live s3 A d0", "write s3 d0 4",
	}, ""},
	{"a disk that was handed off is served beside another", []string{ // A1
		"live s1 A d0", "dest p1 B d0 A0", "handoff s1", "write p1 d0 1", "await s1", "kill s1", "live s2 A d0,d1",
	}, ""},
	{"disks that were handed off one by one are served together", []string{ // A1
		"live s1 A d0", "dest p1 B d0 A0", "handoff s1", "await s1", "kill s1",
		"live s2 A d1", "dest p2 B d1 A1", "handoff s2", "await s2", "kill s2", "live s3 A d0,d1",
	}, ""},
	{"the dest command of an earlier move runs again", []string{ // A2
		"live s1 A d0", "dest p1 B d0 A0", "handoff s1", "await p1", "term p1",
		"live s2 B d0", "dest p2 A e0 B0", "handoff s2", "write p2 d0 1", "await s2", "kill s2", "inspect B d0", "dest p3 B d0 A0",
	}, ""},
	{"a second destination waits for a frozen disk", []string{ // A4
		"source s1 A d0 slow", "dest p1 B d0 A0", "write p1 d0 1 flush", "dest p2 B e0 A0", "kill p1", "fast s1", "await s1",
	}, ""},
	{"a second destination gets in when the connection breaks", []string{ // A4
		"source s1 A d0 slow", "dest p1 B d0 A0", "write p1 d0 1 flush", "dest p2 B e0 A0", "swap A0", "fast s1", "await s1",
	}, ""},
	{"a frozen disk in mid-move is served live", []string{ // A4
		"source s1 A d0 slow", "dest p1 B d0 A0", "write p1 d0 1 flush", "kill s1", "live s2 A d0", "write s2 d0 2",
	}, ""},
	{"a live source is rolled back with its disk", []string{ // A5
		"live s0 A d0", "kill s0", "snap A d0 t1", "live s1 A d0", "write s1 d0 1", "dest p1 B d0 A0", "await p1", "kill s1",
		"restore A t1 ds d0", "live s2 A d0", "write s2 d0 2", "handoff s2", "await p1", "read p1 d0",
	}, ""},
	{"a frozen source is rolled back with its disk", []string{ // A5, F4
		"source s0 A d0 slow", "kill s0", "snap A d0 t1", "tamper A d0 1", "source s1 A d0 slow", "dest p1 B d0 A0", "read p1 d0", "kill s1",
		"restore A t1 ds d0", "tamper A d0 2", "source s2 A d0", "await s2",
	}, ""},
	{"a destination is rolled back in standby", []string{ // A6
		"live s1 A d0", "dest p1 B d0 A0", "await p1", "term p1", "snap B d0 t1", "dest p2 B d0 A0", "write s1 d0 1", "await s1 pass", "term p2",
		"restore B t1 dms d0", "dest p3 B d0 A0", "handoff s1", "await p3", "read p3 d0",
	}, ""},
	{"a destination is rolled back in standby, unseen by its file", []string{ // A6
		"live s1 A d0", "dest p1 B d0 A0", "await p1", "term p1", "dest p2 B d0 A0", "snap B d0 t1", "write s1 d0 1", "await s1 pass", "kill p2",
		"restore B t1 dms d0 inplace", "dest p3 B d0 A0", "handoff s1", "await p3", "read p3 d0",
	}, ""},
	{"a destination that was live comes back as it was in standby", []string{ // A6
		"live s1 A d0 slow", "dest p1 B d0 A0", "snap B d0 t1", "handoff s1", "write p1 d0 1 flush", "kill p1",
		"restore B t1 dms d0 inplace", "dest p2 B d0 A0", "fast s1", "await p2",
	}, ""},
	{"a destination that was live comes back as it was when live", []string{ // A6
		"source s1 A d0 slow", "dest p1 B d0 A0", "write p1 d0 1 flush", "snap B d0 t1", "write p1 d0 2 flush", "kill p1",
		"restore B t1 dms d0 inplace", "dest p2 B d0 A0", "fast s1", "await p2", "read p2 d0",
	}, ""},
	{"a copy of a destination in standby comes later", []string{ // A6
		"live s1 A d0 slow", "dest p1 B d0 A0", "snap B d0 t1", "handoff s1", "write p1 d0 1 flush", "kill p1",
		"restore B t1 dms d0", "dest p2 B d0 A0", "fast s1", "await p2",
	}, ""},
	{"a copy of a destination goes beside it", []string{ // A6
		"live s1 A d0 slow", "dest p1 B d0 A0", "snap B d0 t1", "handoff s1", "write p1 d0 1 flush",
		"restore B t1 dms e0", "dest p2 B e0 A0", "cut A0", "fast s1", "await p2",
	}, ""},
	{"another disk takes the name of one that is half there", []string{ // F1
		"source s1 A d0 slow", "dest p1 B d0 A0", "read p1 d0", "kill p1", "replace B d0 1", "dest p2 B d0 A0", "fast s1", "await s1",
	}, ""},
	{"a disk that is half there is put back to an earlier state", []string{ // F1, I6
		"source s1 A d0 slow", "dest p1 B d0 A0", "snap B d0 t1", "write p1 d0 1 flush", "term p1", "restore B t1 d d0",
		"dest p2 B d0 A0", "fast s1", "await s1",
	}, ""},
	{"a map is put back to an earlier state", []string{ // I6
		"source s1 A d0 slow", "dest p1 B d0 A0", "snap B d0 t1", "write p1 d0 1 flush", "term p1", "restore B t1 m d0",
		"dest p2 B d0 A0", "fast s1", "await s1", "read p2 d0",
	}, ""},
	{"dest is killed under a client", []string{ // F2
		"source s1 A d0 slow", "dest p1 B d0 A0", "write p1 d0 1", "kill s1", "kill p1", "dest p2 B d0 A0", "source s2 A d0", "await p2", "read p2 d0",
	}, ""},
	{"a frozen disk is written while it is sent", []string{ // F7, A9
		"source s1 A d0 slow", "dest p1 B d0 A0", "tamper A d0 1", "fast s1", "await s1",
	}, ""},
	{"a disk that was handed off is served by another name", []string{ // A10
		"sym A d0 e0", "live s1 A e0", "dest p1 B d0 A0", "handoff s1", "write p1 d0 1", "kill s1", "live s2 A d0",
	}, ""},
	{"a disk that was handed off is served by a hard link", []string{ // A10
		"ln A d0 e0", "live s1 A e0", "dest p1 B d0 A0", "handoff s1", "write p1 d0 1", "kill s1", "live s2 A d0",
	}, ""},
	{"the state file of a disk that was handed off is put back", []string{ // A10
		"snap A d0 t1", "live s1 A d0", "dest p1 B d0 A0", "handoff s1", "write p1 d0 1", "kill s1", "restore A t1 s d0", "live s2 A d0",
	}, ""},
	{"a live source ends before the handoff", []string{ // X1
		"live s1 A d0 slow", "dest p1 B d0 A0", "term s1", "live s2 A d0", "write s2 d0 1", "handoff s2", "await p1",
	}, ""},
	{"the host of the source is full", []string{ // B1
		"live s1 A d0", "dest p1 B d0 A0", "fill A", "handoff s1", "write s1 d0 1", "free A", "handoff s1", "write p1 d0 2", "await p1",
	}, ""},
	{"the host of the destination is full", []string{ // F13
		"live s1 A d0 slow", "dest p1 B d0 A0", "fill B", "handoff s1", "write p1 d0 1", "free B", "fast s1", "write p1 d0 2", "await p1",
	}, ""},
	{"a golden image goes to two", []string{
		"clone s1 A d0", "dest p1 B d0 A0", "write p1 d0 1", "dest p2 B e0 A0", "write p2 d0 2", "await p1", "await p2", "term s1",
	}, ""},
	{"a disk is taken back", []string{
		"live s1 A d0 slow", "dest p1 B d0 A0", "handoff s1", "write p1 d0 1", "kill s1", "live s2 A d0 reclaim", "write s2 d0 2", "cut A0", "read p1 d0", "handoff s2",
	}, ""},
	{"both hosts lose power", []string{
		"live s1 A d0 slow", "dest p1 B d0 A0", "write s1 d0 1 flush", "handoff s1", "write p1 d0 2 flush", "write p1 d0 3", "power B", "power A",
		"live s2 A d0", "dest p2 B d0 A0", "read p2 d0", "await p2",
	}, ""},
	{"the source dies in the handoff", []string{
		"live s1 A d0", "dest p1 B d0 A0", "write s1 d0 1", "killhandoff s1 7", "live s2 A d0", "dest p2 B d0 A0", "handoff s2", "write p2 d0 1", "write p1 d0 2",
	}, ""},
	{"a live source is started again before the handoff", []string{
		"live s1 A d0", "dest p1 B d0 A0", "await p1", "write s1 d0 1", "kill s1", "live s2 A d0", "write s2 d0 2", "handoff s2", "await p1", "read p1 d0",
	}, ""},
	{"a source that can keep no identity comes back changed", []string{
		"ro A", "source s1 A d0 slow", "dest p1 B d0 A0", "kill s1", "rw A", "tamper A d0 1", "ro A", "source s2 A d0", "await s2",
	}, ""},
	{"a copy of a source has changed and goes on for it", []string{
		"source s0 A d0 slow", "kill s0", "snap A d0 t1", "restore A t1 ds e0", "source s1 A d0 slow", "dest p1 B d0 A0", "swap A0", "kill s1",
		"tamper A e0 1", "source s2 A e0", "await s2", "await p1",
	}, ""},
	{"a copy of a live source goes on for it", []string{
		"live s0 A d0", "kill s0", "snap A d0 t1", "restore A t1 ds e0", "live s1 A d0", "dest p1 B d0 A0", "await p1", "kill s1",
		"live s2 A e0", "write s2 d0 1", "handoff s2", "await p1",
	}, ""},
}
