/* The table of an instruction set's functions, from what the file has defined and included before it. */
#define INSTRUCTION_SET(identifier, title)                                                                             \
    const struct instruction_set identifier = {title,  available, pack_rows,     pack_planes,    multiply, \
                                               finish, max_pool,  prepared_size, prepare_inputs, multiply_floats}
